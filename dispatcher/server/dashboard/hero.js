// How far the run is, in what state, and what needs somebody's eye.

import { Rows, byId, make, setAttribute, setClass, setText } from "./dom.js";
import {
  baseName, count, duration, percentDown, plural, rate, share, time,
} from "./format.js";

const STATES = {
  running: ["Running", "good"],
  paused: ["Paused", "warn"],
  draining: ["Draining", "warn"],
  complete: ["Complete", "good"],
};

// What the state means just now, in a sentence.
function sentence(status, startedAt, serverTime) {
  switch (status.state) {
    case "complete":
      return status.failed
        ? `Every line is answered; ${plural(status.failed, "of them is an error", "of them are errors")}.`
        : "Every line is answered, none with an error.";
    case "paused":
      return "Nothing is handed out; what is under way may finish.";
    case "draining":
      return "Nothing more is handed out; results are still taken.";
    default:
      if (!status.workers && !status.issued) {
        return status.next_work_id
          ? "No worker is here; the run goes on as soon as one comes."
          : "Waiting for a first worker.";
      }
      if (!status.done) return "The first lines are under way.";
      return startedAt ? `Started ${duration(serverTime - Date.parse(startedAt) / 1000)} ago.` : "";
  }
}

function notices(status) {
  const found = [];
  if (status.paused) {
    const { message } = status.paused;
    found.push(["warn", "paused", message.charAt(0).toUpperCase() + message.slice(1)]);
  }
  if (status.copying?.problem) found.push(["bad", "input", status.copying.problem]);
  if (status.output_error) found.push(["bad", "output", `The output stands still: ${status.output_error}`]);
  if (status.failure_warning) {
    found.push(["warn", "jump", `Suddenly more lines fail: ${status.failure_warning.message}`]);
  }
  if (status.blocked_by_window) {
    found.push([
      "warn", "window",
      `No new line is handed out before line ${status.waiting_for ?? status.last_processed_work_id + 1}`
      + " is done (--window).",
    ]);
  }
  return found;
}

function timeLeft(status, now) {
  if (status.state === "complete") return "";
  const left = status.time_left;
  if (!left) {
    return status.state === "running"
      ? "No estimate of the time left yet: too little was finished to tell a pace."
      : "No estimate of the time left while nothing is handed out.";
  }
  return `${duration(left.seconds)} left at the pace of the last ${duration(left.over_s)}, `
    + `done about ${time(now + left.seconds * 1000)}`;
}

const FIGURES = [
  ["Items/s", (s) => rate(s.rate.items_per_s), () => "over the last 30 s"],
  ["Tokens/s", (s) => rate(s.rate.tokens_per_s), (s) => `${count(s.completion_tokens)} generated`],
  ["In flight", (s) => count(s.issued), (s) =>
    (s.heap_size ? `and ${count(s.heap_size)} more are ready` : "handed out, no result yet")],
  ["Waiting", (s) => count(s.pending), (s) =>
    (s.pending ? `behind line ${s.waiting_for}` : "no finished line waits")],
  ["Failed", (s) => count(s.failed), (s) => (s.done ? `${share(s.failed, s.done)} of those finished` : "none yet"),
    (s) => (s.failed ? "bad" : "")],
  ["Workers", (s) => count(s.workers), (s) =>
    (s.state === "complete" ? "nothing left to do" : `${count(s.requests_in_flight)} requests in flight`)],
];

export class Hero {
  constructor(announce) {
    this.announce = announce;
    this.said = null;
    this.figures = FIGURES.map(([label, value, note, tone]) => {
      const shown = make("span", { class: "value" }), small = make("span", { class: "note" });
      const cell = make("div", {}, make("dt", { text: label }), make("dd", {}, shown, small));
      byId("figures").append(cell);
      return { cell, value, note, tone, shown, small };
    });
    this.notices = new Rows(
      byId("notices"), ([, key]) => key,
      () => ({ node: make("p") }),
      (row, [tone, , text]) => {
        setClass(row.node, `notice ${tone}`);
        setText(row.node, text);
      },
    );
  }

  // `away` says since when the server does not answer, and is null while it does.
  update({ status, time: serverTime }, settings, now, away) {
    const meaning = sentence(status, settings?.started_at, serverTime);
    const ended = away !== null && status.state === "complete";
    const [word, tone] = away !== null && !ended
      ? ["No answer", "bad"] : (STATES[status.state] || [status.state, ""]);
    const says = away === null ? meaning
      : ended ? `${meaning} Its server has ended.`
        : `${away} What stands here is from before.`;
    const name = baseName(settings?.files?.output) || "The run";
    setText(byId("run-name"), name);
    setText(byId("state"), word);
    setClass(byId("state"), `pill ${tone}`);
    setText(byId("state-says"), says);
    this.notices.set(notices(status));
    this.progress(status, now);
    for (const figure of this.figures) {
      setText(figure.shown, figure.value(status));
      setText(figure.small, figure.note(status));
      setClass(figure.cell, figure.tone ? figure.tone(status) : "");
    }
    const title = `${percentDown(status.done, status.total)} % · ${name}`;
    const whole = away !== null && !ended ? `no answer · ${name}` : title;
    if (document.title !== whole) document.title = whole;
    this.say(word, status, says);
  }

  progress(status, now) {
    const about = status.total_is_exact ? "" : "about ";
    const percent = percentDown(status.done, status.total);
    setText(byId("percent"), percent);
    const isRead = status.total > 0 || status.total_is_exact;
    setText(byId("done-of"), isRead
      ? `${count(status.done)} of ${about}${plural(status.total, "line")}` : "No line was read yet");
    setText(byId("time-left"), timeLeft(status, now));
    const bar = byId("bar");
    setAttribute(bar, "aria-valuenow", percent);
    setAttribute(
      bar, "aria-valuetext",
      `${percent} %, ${count(status.done)} of ${about}${plural(status.total, "line")}, ${count(status.failed)} failed`,
    );
    const total = Math.max(status.total, status.done + status.issued, 1);
    const width = (node, part) => {
      const text = `${((100 * part) / total).toFixed(3)}%`;
      if (node.style.width !== text) node.style.width = text;
    };
    width(byId("bar-ok"), status.done - status.failed);
    width(byId("bar-failed"), status.failed);
    width(byId("bar-flight"), status.state === "complete" ? 0 : status.issued);
  }

  // Tells those who listen what changed, rarely: the state, and every tenth of the run.
  say(word, status, says) {
    const tenth = status.total ? Math.floor((10 * status.done) / status.total) : 0;
    const key = `${word} ${tenth}`;
    if (key === this.said) return;
    this.said = key;
    this.announce(`${word}. ${says} ${percentDown(status.done, status.total)} % done.`);
  }
}
