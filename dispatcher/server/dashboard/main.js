// The page: asks for the token once, looks every two seconds, and hands what it sees to its parts.

import { Refused, dropToken, get, hasToken, keepToken, wantsToken } from "./api.js";
import { Chart } from "./chart.js";
import { Controls } from "./controls.js";
import { byId, make, setText, show } from "./dom.js";
import { Failures } from "./failures.js";
import { time } from "./format.js";
import { Hero } from "./hero.js";
import { Item } from "./item.js";
import { Series } from "./series.js";
import { Settings } from "./settings.js";
import { Models, Workers } from "./workers.js";

const EVERY_MS = 2000;
const EVERY_HIDDEN_MS = 30000;
const SHORTLY_MS = 1000; // a reply of the server serves others for so long
const RANGES = [["10 min", 600], ["2 h", 7200], ["1 day", 86400], ["8 days", 691200]];

let overview = null; // the last reply
let settings = null;
let next = null;
let awaySince = null;
let timer = 0;
let isLooking = false;
let isAsking = false;
let range = 600;

const announce = (text) => setText(byId("announcer"), text);
const item = new Item(() => settings);
const series = new Series();
const hero = new Hero(announce);
const failures = new Failures((line) => item.open(line));
const workers = new Workers();
const models = new Models();
const shownSettings = new Settings();
const controls = new Controls(announce, () => {
  look();
  setTimeout(look, SHORTLY_MS);
});
const charts = [
  new Chart(byId("items-chart"), {
    title: "Items/s", unit: "items a second", tone: "items",
    value: (point) => point.items, second: (point) => point.failed,
  }),
  new Chart(byId("tokens-chart"), {
    title: "Tokens/s", unit: "tokens a second", tone: "tokens", value: (point) => point.tokens,
  }),
];

async function look() {
  if (isLooking) return;
  isLooking = true;
  clearTimeout(timer);
  try {
    const query = next === null ? "" : `?since=${encodeURIComponent(next)}`;
    const found = await get(`overview${query}`);
    const now = Date.now();
    if (overview && found.status.run !== overview.status.run) series.levels.clear();
    overview = found;
    next = found.next;
    settings = found.settings || settings;
    series.take(found.points, now);
    awaySince = null;
    show(byId("ask"), false);
    show(byId("run"), true);
    draw(now);
  } catch (error) {
    if (error instanceof Refused && error.status === 401) ask();
    else {
      if (error instanceof Refused && error.status === 400) next = null; // of another server, say
      awaySince = awaySince ?? Date.now();
      drawAway(error);
    }
  }
  isLooking = false;
  schedule();
}

function schedule() {
  clearTimeout(timer);
  if (isAsking) return; // it is looked at again once there is a token
  timer = setTimeout(look, document.hidden ? EVERY_HIDDEN_MS : EVERY_MS);
}

function draw(now) {
  const { status } = overview;
  hero.update(overview, settings, now, null);
  controls.update(status, false);
  failures.update(overview);
  workers.update(overview.workers);
  models.update(status.models);
  if (settings) shownSettings.update(settings, status);
  drawCharts(now);
  setText(byId("looked"), `run ${status.run} · seen ${time(now, true)}`);
  if (settings?.version) setText(byId("footer"), `Dispatcher ${settings.version}`);
}

function drawCharts(now) {
  const { items_per_s: items, tokens_per_s: tokens } = overview.status.rate;
  const { every, points } = series.last(range, now);
  // What is now stands at the right edge, between two points of the server, too.
  if (points.length) points.push({ ...points[points.length - 1], at: now, items, tokens });
  // A run that is younger than the range fills the chart all the same.
  const seconds = Math.min(range, Math.max(60, series.age(now) + every));
  charts[0].show(points, every, seconds, now, items);
  charts[1].show(points, every, seconds, now, tokens);
}

function drawAway(error) {
  const problem = error instanceof Refused ? `The server refuses: ${error.message}; trying again.`
    : `The server does not answer since ${time(awaySince, true)}; trying again.`;
  if (overview) {
    hero.update(overview, settings, Date.now(), problem);
    controls.update(overview.status, true);
  } else {
    setText(byId("looked"), problem);
  }
}

function ask() {
  const wasGiven = hasToken();
  isAsking = true;
  dropToken();
  next = null;
  show(byId("run"), false);
  show(byId("ask"), true);
  setText(byId("looked"), "");
  setText(byId("ask-problem"), wasGiven ? "That is not this run's token." : "");
  byId("token").focus();
}

byId("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keepToken(byId("token").value.trim());
  isAsking = false;
  event.target.reset();
  look();
});

byId("look-form").addEventListener("submit", (event) => {
  event.preventDefault();
  item.open(byId("line").value.trim());
});

for (const [label, seconds] of RANGES) {
  const input = make("input", { type: "radio", name: "range", value: String(seconds) });
  input.checked = seconds === range;
  input.addEventListener("change", () => {
    range = seconds;
    if (overview) drawCharts(Date.now());
  });
  byId("ranges").append(make("label", {}, input, make("span", { text: label })));
}

document.addEventListener("visibilitychange", () => (document.hidden ? schedule() : look()));
if (hasToken() || !wantsToken()) look();
else ask();
