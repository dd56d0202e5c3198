// What changes the run: asked about first, and done with the admin token.

import { Away, change, dropAdminToken, hasAdminToken, keepAdminToken } from "./api.js";
import { byId, setText, show } from "./dom.js";

const NOT_KNOWN = "This server does not know that call; it is older than the page.";

const CHANGES = {
  pause: {
    title: "Pause the run",
    says: "Nothing more is handed out until somebody lets the run go on. What is under way may "
      + "finish, and its results are kept.",
    field: { label: "Why (for others to read; may be empty)", value: () => "", type: "text" },
    call: (reason) => ["pause", reason ? { paused: true, reason } : { paused: true }],
    doIt: "Pause",
  },
  goOn: {
    title: "Let the run go on",
    says: "Lines are handed out again.",
    call: () => ["pause", { paused: false }],
    doIt: "Go on",
  },
  accept: {
    title: "Let the run go on",
    says: "It is paused because more lines failed than may. Those that failed so far stay error "
      + "lines and count no more; lines that fail from now on do.",
    call: () => ["max_failures", { accept: true }],
    doIt: "Accept them and go on",
  },
  timeout: {
    title: "Work timeout",
    says: "For how many seconds a line may go without progress before somebody else gets it. It "
      + "holds for lines that are handed out already, too.",
    field: {
      label: "Seconds", value: (status) => String(status.work_timeout_s), type: "number",
    },
    call: (seconds) => ["work_timeout", { timeout: Number(seconds) }],
    check: (seconds) => (Number(seconds) > 0 ? "" : "Give seconds above 0."),
    doIt: "Set it",
  },
  drain: {
    title: "Drain the server",
    says: "For the end of a shift: the server hands out nothing more, takes what workers finish or "
      + "give back, and ends. The same command starts it again where it was.",
    call: () => ["drain", {}],
    doIt: "Drain",
  },
};

export class Controls {
  constructor(announce, lookAgain) {
    this.announce = announce;
    this.lookAgain = lookAgain;
    this.dialog = byId("change");
    this.status = null;
    this.chosen = null;
    byId("pause").addEventListener("click", () => this.ask(this.ofPause()));
    byId("timeout").addEventListener("click", () => this.ask(CHANGES.timeout));
    byId("drain").addEventListener("click", () => this.ask(CHANGES.drain));
    byId("change-cancel").addEventListener("click", () => this.dialog.close());
    byId("change-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.perform();
    });
  }

  update(status, isAway) {
    this.status = status;
    const over = isAway || status.state === "complete";
    setText(byId("pause"), status.paused ? "Go on…" : "Pause…");
    for (const id of ["pause", "timeout", "drain"]) {
      const off = over || (id !== "timeout" && status.state === "draining");
      if (byId(id).disabled !== off) byId(id).disabled = off;
    }
  }

  // A pause by too many failed lines is ended by accepting them; then an operator's may be left.
  ofPause() {
    if (!this.status?.paused) return CHANGES.pause;
    return this.status.paused.by.includes("failures") ? CHANGES.accept : CHANGES.goOn;
  }

  ask(chosen) {
    this.chosen = chosen;
    setText(byId("change-title"), chosen.title);
    setText(byId("change-says"), chosen.says);
    setText(byId("change-do"), chosen.doIt);
    setText(byId("change-problem"), "");
    show(byId("change-field"), Boolean(chosen.field));
    const input = byId("change-value");
    if (chosen.field) {
      setText(byId("change-label"), chosen.field.label);
      input.type = chosen.field.type;
      input.value = chosen.field.value(this.status);
    }
    this.showAdminField();
    this.dialog.showModal();
    if (chosen.field) input.focus();
    else if (!hasAdminToken()) byId("admin").focus();
    else byId("change-do").focus();
  }

  showAdminField() {
    show(byId("admin-field"), !hasAdminToken());
    byId("admin").required = !hasAdminToken();
  }

  async perform() {
    const { chosen } = this;
    const value = chosen.field ? byId("change-value").value.trim() : "";
    const wrong = chosen.check ? chosen.check(value) : "";
    if (wrong) return setText(byId("change-problem"), wrong);
    if (!hasAdminToken()) keepAdminToken(byId("admin").value.trim());
    byId("admin").value = "";
    byId("change-do").disabled = true;
    try {
      const said = await change(...chosen.call(value));
      this.dialog.close();
      this.announce(said.message || "Done.");
      this.lookAgain();
    } catch (error) {
      setText(byId("change-problem"), this.problem(error));
      this.showAdminField();
      if (!hasAdminToken()) byId("admin").focus();
    } finally {
      byId("change-do").disabled = false;
    }
    return undefined;
  }

  problem(error) {
    if (error instanceof Away) return "The server does not answer; nothing is known to be changed.";
    if (error.status === 401 || error.status === 403) {
      dropAdminToken();
      return "That is not the admin token of this run.";
    }
    return error.status === 404 || error.status === 405 ? NOT_KNOWN : error.message;
  }
}
