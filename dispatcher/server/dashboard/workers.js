// Who works on the run, and what was asked of which model.

import { Rows, byId, make, setClass, setText, show, tableRow } from "./dom.js";
import { ago, count, plural, rate } from "./format.js";

const BACKENDS = { up: ["up", "good"], down: ["down", "bad"], unknown: ["not told", ""] };

export class Workers {
  constructor() {
    const classes = ["name", "", "", "number", "number", "number", "number", "number"];
    this.rows = new Rows(
      byId("workers").tBodies[0], (worker) => worker.name,
      () => {
        const row = tableRow(classes);
        row.pill = make("span");
        row.cells[2].append(row.pill);
        return row;
      },
      (row, worker) => {
        const gone = worker.vanished_s !== null;
        const [word, tone] = gone ? ["vanished", "bad"] : BACKENDS[worker.backend] || [worker.backend, ""];
        setClass(row.node, gone ? "gone" : "");
        setText(row.cells[0], worker.name);
        setText(row.cells[1], worker.node ?? "–");
        setText(row.pill, word);
        setClass(row.pill, `pill small ${tone}`);
        setText(row.cells[3], count(worker.in_flight));
        setText(row.cells[4], count(worker.requests_in_flight));
        setText(row.cells[5], worker.items_per_s === null ? "–" : rate(worker.items_per_s));
        setText(row.cells[6], count(worker.finished));
        setText(row.cells[7], ago(worker.seen_s));
      },
    );
  }

  update({ listed, count: all, in_flight_without_name: nameless }) {
    this.rows.set(listed);
    show(byId("workers"), listed.length > 0);
    const gone = listed.filter((worker) => worker.vanished_s !== null).length;
    const down = listed.filter((w) => w.vanished_s === null && w.backend === "down").length;
    const nodes = new Set(listed.map((worker) => worker.node).filter(Boolean)).size;
    const parts = [listed.length ? plural(all, "worker") : "None is here."];
    if (nodes > 1) parts.push(`on ${plural(nodes, "node")}`);
    if (gone) parts.push(`${count(gone)} vanished`);
    if (down) parts.push(`${plural(down, "model server")} down`);
    if (all > listed.length) parts.push(`${count(all - listed.length)} more are not listed`);
    if (nameless) parts.push(`${plural(nameless, "line")} with clients that give no name`);
    setText(byId("workers-say"), parts.join(" · "));
  }
}

const seconds = (times, name) =>
  (times?.[name] == null ? "–" : `${Number(times[name].toPrecision(3))} s`);

export class Models {
  constructor() {
    this.rows = new Rows(
      byId("models").tBodies[0], ([name]) => name,
      () => tableRow(["name", ...Array(8).fill("number")]),
      (row, [name, model]) => {
        const texts = [
          name,
          model.limit ? `${count(model.in_flight)} of ${count(model.limit)}` : count(model.in_flight),
          count(model.requests), count(model.errors),
          count(model.prompt_tokens), count(model.completion_tokens),
          seconds(model.ttft_s, "p50"), seconds(model.latency_s, "p50"),
          seconds(model.latency_s, "p95"),
        ];
        texts.forEach((text, place) => setText(row.cells[place], text));
      },
    );
  }

  update(models) {
    const entries = Object.entries(models);
    this.rows.set(entries);
    show(byId("models-panel"), entries.length > 0);
  }
}
