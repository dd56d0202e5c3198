// Why lines failed, what was handed out again, and the lines that failed last.

import { Rows, byId, make, setClass, setText, show, tableRow } from "./dom.js";
import { ago, count, share } from "./format.js";

const AGAIN = [
  ["charged", "charged", "failed tries that count against --max-retries"],
  ["expired_reissues", "work timeouts", "of these, lines without progress for too long"],
  ["crashed", "crashes", "a worker or its model server died under a line"],
  ["released", "given back", "by workers that were told to stop"],
  ["returned", "returned", "held but not begun, or nobody's fault"],
];

export class Failures {
  constructor(lookAt) {
    this.causes = new Rows(
      byId("causes").tBodies[0], ([kind]) => kind,
      () => {
        const row = tableRow(["cause", "number", "number", "number"]);
        row.name = make("span");
        row.meter = make("span", { class: "meter", "aria-hidden": "true" });
        row.cells[0].append(row.name, row.meter);
        return row;
      },
      (row, [kind, lines, failed, buried]) => {
        setText(row.name, kind);
        const width = `${((100 * lines) / Math.max(1, failed)).toFixed(2)}%`;
        if (row.meter.style.width !== width) row.meter.style.width = width;
        setText(row.cells[1], count(lines));
        setText(row.cells[2], share(lines, failed));
        setText(row.cells[3], buried ? count(buried) : "–");
      },
    );
    this.again = AGAIN.map(([key, label, meaning]) => {
      const value = make("span", { class: "value" });
      const row = make(
        "div", {}, make("dt", { text: label }),
        make("dd", {}, value, make("span", { class: "note", text: meaning })),
      );
      byId("again").append(row);
      return { key, row, value };
    });
    this.errors = new Rows(
      byId("errors"), (error) => `${error.line} ${error.at ?? "earlier"}`,
      (error) => {
        const button = make("button", { class: "line-button", type: "button" });
        button.addEventListener("click", () => lookAt(error.line));
        const kind = make("span", { class: "kind" }), when = make("span", { class: "when muted" });
        const message = make("p", { class: "message" });
        return {
          node: make("li", {}, make("p", { class: "error-head" }, button, kind, when), message),
          button, kind, when, message,
        };
      },
      (row, error) => {
        setText(row.button, `line ${error.line}`);
        setText(row.kind, error.kind);
        setText(row.when, error.at === null ? "before this server started" : ago(error.age));
        setText(row.message, error.message || "");
        show(row.message, Boolean(error.message));
      },
    );
  }

  update(overview) {
    const { status, errors } = overview;
    // Tombstones are failed lines that the server wrote itself.
    const kinds = Object.entries(status.errors).filter(([, lines]) => lines > 0);
    kinds.sort(([a, x], [b, y]) => y - x || (a < b ? -1 : 1));
    const told = kinds.reduce((sum, [, lines]) => sum + lines, 0);
    const rows = kinds.map(([kind, lines]) =>
      [kind, lines, status.failed, status.tombstones[kind] || 0]);
    if (status.failed > told) rows.push(["of other kinds", status.failed - told, status.failed, 0]);
    this.causes.set(rows);
    show(byId("causes"), rows.length > 0);
    show(byId("no-causes"), rows.length === 0);
    byId("causes").classList.toggle("none-buried", !rows.some(([, , , buried]) => buried));
    for (const { key, row, value } of this.again) {
      setText(value, count(status[key]));
      setClass(row, status[key] ? "" : "none");
    }
    const latest = errors.latest.map((error) => ({ ...error, age: overview.time - error.at }));
    const known = new Set(latest.map((error) => error.kind));
    for (const [kind, line] of Object.entries(errors.line_of_kind)) {
      if (!known.has(kind)) latest.push({ line, kind, message: "", at: null });
    }
    this.errors.set(latest);
    show(byId("no-errors"), latest.length === 0);
  }
}
