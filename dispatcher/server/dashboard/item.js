// One line: its input, what it went through, and its result, in a dialog.

import { Away, get } from "./api.js";
import { byId, make, setText } from "./dom.js";
import { bytes, duration, plural } from "./format.js";

const STATES = {
  unread: ["not handed out", ""],
  ready: ["ready", ""],
  leased: ["in flight", "good"],
  waiting: ["finished, waiting", ""],
  written: ["in the output", "good"],
  condemned: ["out of reissues", "bad"],
};
const ENDS = {
  charged: "charged", crashed: "crashed", released: "given back", returned: "returned",
  result: "gave the result",
};

const nameOf = (worker) => worker || "a worker without a name";

function piece(title, found, absent) {
  const head = make("h3", { text: title });
  if (!found) return [head, make("p", { class: "muted", text: absent })];
  if (found.problem) return [head, make("p", { class: "muted", text: `It ${found.problem}.` })];
  const size = found.is_cut
    ? `the beginning of ${bytes(found.bytes)}, cut` : bytes(found.bytes);
  return [
    make("h3", {}, title, " ", make("span", { class: "muted", text: size })),
    make("pre", { tabindex: "0", "aria-label": title, text: pretty(found) }),
  ];
}

// JSON is easier to read in lines of its own; what was cut, or is none, stays as it is.
function pretty({ text, is_cut: isCut }) {
  if (isCut) return text;
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch (error) {
    return text;
  }
}

function leases(found) {
  return (found.leases || []).map((lease) => make("li", {
    text: `with ${nameOf(lease.worker)} for ${duration(lease.held_s)}, `
      + (lease.is_started
        ? `last progress ${duration(lease.progressed_s)} ago` : "not begun")
      + (lease.solo ? ", alone on its model server" : ""),
  }));
}

function attempts(found) {
  const all = found.attempts || [];
  if (!all.length) {
    const giver = found.worker ? `Its result came from ${found.worker}. ` : "";
    const rest = found.state === "unread" ? ""
      : "No try of it failed on the way, as far as is known.";
    return giver || rest ? [make("p", { class: "muted", text: giver + rest })] : [];
  }
  const body = make("tbody");
  for (const each of all) {
    body.append(make(
      "tr", {},
      make("th", { scope: "row", text: each.attempt || "–" }),
      make("td", { text: ENDS[each.end] || each.end || "–" }),
      make("td", { text: each.reason || "–" }),
      make("td", { class: "name", text: nameOf(each.worker) }),
    ));
  }
  const head = make("tr", {}, ...["Try", "End", "Reason", "Worker"].map(
    (text) => make("th", { scope: "col", text }),
  ));
  const table = make(
    "table", {}, make("caption", { class: "unseen", text: "Its tries" }),
    make("thead", {}, head), body,
  );
  return [make("div", {
    class: "scroll", role: "region", "aria-label": "Its tries", tabindex: "0",
  }, table)];
}

function counts(found) {
  const parts = [];
  if (found.retries) parts.push(plural(found.retries, "charged try", "charged tries"));
  if (found.crashes) parts.push(plural(found.crashes, "crash", "crashes"));
  if (found.releases) parts.push(`given back ${plural(found.releases, "time")}`);
  return parts.length ? [make("p", { class: "muted", text: parts.join(", ") })] : [];
}

function describe(found) {
  const [word, tone] = STATES[found.state] || [found.state, ""];
  const failed = found.result?.error;
  const says = found.says.charAt(0).toUpperCase() + found.says.slice(1);
  const held = leases(found);
  return [
    make(
      "p", { class: "state" }, make("span", { class: `pill ${tone}`, text: word }), " ",
      ...(failed ? [make("span", { class: "pill bad", text: `error: ${failed}` }), " "] : []),
      `${says}.`,
    ),
    ...(held.length ? [make("ul", {}, ...held)] : []),
    ...counts(found),
    make("h3", { text: "What it went through" }),
    ...attempts(found),
    ...piece("Input", found.input, "It cannot be shown."),
    ...piece(failed ? "Error" : "Result", found.result, "No result yet."),
  ];
}

export class Item {
  constructor(settingsNow) {
    this.settingsNow = settingsNow;
    this.dialog = byId("item");
    this.wanted = 0;
  }

  async open(line) {
    const mine = (this.wanted += 1);
    setText(byId("item-title"), `Line ${line}`);
    byId("item-body").replaceChildren(make("p", { class: "muted", text: "Looking…" }));
    if (!this.dialog.open) this.dialog.showModal();
    let content;
    try {
      content = describe(await get(`items/${encodeURIComponent(line)}`));
      content.push(...this.hint(line));
    } catch (error) {
      const text = error instanceof Away ? "The server does not answer; try again." : error.message;
      content = [make("p", { class: "problem", role: "alert", text })];
    }
    if (mine === this.wanted) byId("item-body").replaceChildren(...content);
  }

  hint(line) {
    const state = this.settingsNow()?.files?.state;
    if (!state) return [];
    const words = /^[\w./~-]+$/.test(state) ? state : `'${state.replaceAll("'", "'\\''")}'`;
    return [make(
      "p", { class: "muted hint" }, "All that the files tell of it: ",
      make("code", { text: `dispatcher runs ${words} --item ${line}` }),
    )];
  }
}
