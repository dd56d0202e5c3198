// The settings of the run: how it was started, and the limits that hold now.

import { byId, make } from "./dom.js";
import { bytes, duration } from "./format.js";

const SECONDS = /_s$|timeout$|^lease_term$|^retry$/;
const BYTES = /_bytes$/;

function text(name, value) {
  if (typeof value === "number" && BYTES.test(name)) return bytes(value);
  if (typeof value === "number" && SECONDS.test(name)) return duration(value);
  if (Array.isArray(value)) return value.map((part) => text("", part)).join(", ");
  return typeof value === "object" && value !== null ? JSON.stringify(value) : String(value);
}

const words = (name) => name.replace(/_s$/, "").replace(/_bytes$/, "_size").replaceAll("_", " ");

function group(title, entries) {
  const known = entries.filter(([, value]) => value !== null && value !== undefined && value !== "");
  if (!known.length) return [];
  const list = make("dl", { class: "facts" });
  for (const [name, value] of known) {
    list.append(make("div", {}, make("dt", { text: words(name) }), make("dd", { text: text(name, value) })));
  }
  return [make("div", { class: "group" }, make("h3", { text: title }), list)];
}

export class Settings {
  constructor() {
    this.shown = "";
  }

  // Built anew only when something is another one, so that a selection in it stays.
  update(settings, status) {
    const key = JSON.stringify([
      settings, status.run, status.work_timeout_s, status.max_retries, status.max_failures,
    ]);
    if (key === this.shown) return;
    this.shown = key;
    const limits = { ...settings.limits };
    for (const name of ["work_timeout_s", "max_retries", "max_failures"]) limits[name] = status[name];
    // Options that are limits, too, may have been changed since.
    const options = Object.entries(settings.options).filter(
      ([name]) => !(name in limits) && !(`${name}_s` in limits) && !/^(infile|outfile|input|output|state)$/.test(name),
    );
    byId("settings").replaceChildren(
      ...group("Run", [
        ["run", status.run], ["start number", status.epoch], ["started", settings.started_at],
        ["command", settings.program], ["in directory", settings.directory],
        ...Object.entries(settings.files),
      ]),
      ...group("Task", [
        ["task", settings.task.spec], ...Object.entries(settings.task_args),
        ...Object.entries(settings.model).map(([name, value]) => [`model ${name}`, value]),
      ]),
      ...group("Limits now", Object.entries(limits)),
      ...group("Options", options),
      ...group("Versions", Object.entries(settings.versions)),
    );
  }
}
