// A line chart over time, drawn as SVG and changed in place.

import { make, setAttribute, setText } from "./dom.js";
import { brief, rate, time } from "./format.js";

const SVG = "http://www.w3.org/2000/svg";
const LEFT = 46, RIGHT = 10, TOP = 8, BOTTOM = 22, HEIGHT = 190;
const LINES_Y = 4;

function svg(tag, attributes = {}) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

// A round number at or above the value, for the top of an axis of four parts.
function ceiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  for (const step of [1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10]) {
    if (value <= step * power * 1.0001) return step * power;
  }
  return 10 * power;
}

const TICKS_S = [10, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 172800];

// Round times of day between two times, at most `most` of them.
function ticks(begin, end, most) {
  const span = (end - begin) / 1000;
  const every = (TICKS_S.find((s) => span / s <= most) || 172800) * 1000;
  const zone = new Date(end).getTimezoneOffset() * 60e3;
  const found = [];
  for (let at = Math.ceil((begin - zone) / every) * every + zone; at <= end; at += every) {
    found.push(at);
  }
  return found;
}

export class Chart {
  constructor(figure, { title, unit, value, second, tone }) {
    this.title = title;
    this.unit = unit;
    this.value = value;
    this.second = second;
    this.now = make("span", { class: "chart-now" });
    this.legend = make("span", { class: "chart-failed", text: "failed" });
    this.legend.hidden = true;
    this.read = make("span", { class: "chart-read muted" });
    const caption = make(
      "figcaption", {}, make("span", { class: "chart-title", text: title }), this.now, this.legend,
      this.read,
    );
    this.svg = svg("svg", { class: `plot ${tone}`, role: "img", height: HEIGHT });
    this.grid = svg("g", { class: "grid" });
    this.axis = svg("g", { class: "axis" });
    this.area = svg("path", { class: "area" });
    this.line = svg("path", { class: "line" });
    this.failed = svg("path", { class: "line failed" });
    this.cursor = svg("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM });
    this.svg.append(this.grid, this.area, this.line, this.failed, this.axis, this.cursor);
    this.empty = make("p", { class: "chart-empty muted", text: "Nothing to draw yet." });
    this.sum = make("p", { class: "chart-sum muted" });
    figure.append(caption, make("div", { class: "plot-box" }, this.svg, this.empty), this.sum);
    this.texts = { x: [], y: [] };
    this.rules = [];
    this.width = 0;
    this.shown = null;
    this.saidAt = 0;
    new ResizeObserver(() => this.redraw()).observe(figure);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.leave());
  }

  // Shows points of the last seconds; those further apart than a gap are not joined.
  show(points, every, seconds, now, current) {
    this.shown = { points, every, seconds, now, current };
    this.redraw();
  }

  redraw() {
    if (!this.shown) return;
    const { points, every, seconds, now, current } = this.shown;
    const width = Math.max(240, Math.round(this.svg.parentElement.clientWidth));
    if (width !== this.width) {
      this.width = width;
      this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
      this.svg.setAttribute("width", width);
    }
    const begin = now - seconds * 1000;
    const values = points.map(this.value);
    const peak = Math.max(0, ...values);
    const top = ceiling(peak);
    const x = (at) => LEFT + ((at - begin) / (now - begin)) * (width - LEFT - RIGHT);
    const y = (value) => HEIGHT - BOTTOM - (value / top) * (HEIGHT - TOP - BOTTOM);
    this.place = { x, y, begin };
    this.drawAxes(x, y, peak, begin, now, width);
    const runs = [];
    points.forEach((point, i) => {
      const before = points[i - 1];
      if (!before || point.at - before.at > every * 2500) runs.push([]);
      runs[runs.length - 1].push(point);
    });
    const path = (valueOf) => runs.map((run) => {
      const parts = run.map((p) => `${x(p.at).toFixed(1)} ${y(valueOf(p)).toFixed(1)}`);
      return run.length > 1 ? `M${parts.join("L")}` : `M${parts[0]}h0.1`;
    }).join("");
    const area = runs.filter((run) => run.length > 1).map((run) => {
      const parts = run.map((p) => `${x(p.at).toFixed(1)} ${y(this.value(p)).toFixed(1)}`);
      const last = x(run[run.length - 1].at).toFixed(1), first = x(run[0].at).toFixed(1);
      return `M${parts.join("L")}L${last} ${HEIGHT - BOTTOM}L${first} ${HEIGHT - BOTTOM}Z`;
    }).join("");
    setAttribute(this.line, "d", path(this.value));
    setAttribute(this.area, "d", area);
    const fails = this.second && points.some((point) => this.second(point) > 0);
    setAttribute(this.failed, "d", fails ? path(this.second) : "");
    this.legend.hidden = !fails;
    this.empty.hidden = peak > 0;
    setText(this.empty, points.length > 1 ? "None in this time." : "Nothing to draw yet.");
    setText(this.now, rate(current));
    this.summarise(values, seconds, current);
  }

  drawAxes(x, y, peak, begin, now, width) {
    const top = ceiling(peak);
    const labels = { y: [], x: [] };
    for (let i = 0; i <= LINES_Y; i += 1) {
      const value = (top * i) / LINES_Y;
      if (peak > 0 || i === 0) labels.y.push([LEFT - 8, y(value) + 4, brief(value)]);
      const rule = (this.rules[i] ||= this.grid.appendChild(svg("line")));
      setAttribute(rule, "x1", String(LEFT));
      setAttribute(rule, "x2", String(peak > 0 || i === 0 ? width - RIGHT : LEFT));
      setAttribute(rule, "y1", y(value).toFixed(1));
      setAttribute(rule, "y2", y(value).toFixed(1));
    }
    const marks = ticks(begin, now, Math.max(2, Math.floor(width / 95)));
    const withSeconds = marks.length > 1 && marks[1] - marks[0] < 60e3;
    for (const at of marks) {
      const place = x(at);
      if (place < LEFT + 24 || place > width - 30) continue;
      labels.x.push([place, HEIGHT - 6, time(at, withSeconds)]);
    }
    for (const side of ["x", "y"]) {
      labels[side].forEach(([left, up, text], i) => {
        const label = (this.texts[side][i] ||= this.axis.appendChild(svg("text", { class: side })));
        setAttribute(label, "x", left.toFixed(1));
        setAttribute(label, "y", up.toFixed(1));
        setText(label, text);
      });
      while (this.texts[side].length > labels[side].length) this.texts[side].pop().remove();
    }
  }

  summarise(values, seconds, current) {
    const known = values.length > 0;
    const mean = known ? values.reduce((a, b) => a + b, 0) / values.length : 0;
    const peak = known ? Math.max(...values) : 0, low = known ? Math.min(...values) : 0;
    const text = known && peak > 0 ? `mean ${rate(mean)} · lowest ${rate(low)} · highest ${rate(peak)}` : "";
    setText(this.sum, text);
    // Read out by whoever comes to it; it need not change more often than somebody listens.
    if (Date.now() - this.saidAt > 20000) {
      this.saidAt = Date.now();
      setAttribute(
        this.svg, "aria-label",
        `${this.title} over time: now ${rate(current)} ${this.unit}${text && `, ${text}`}`,
      );
    }
  }

  point(event) {
    const points = this.shown?.points || [];
    if (!points.length) return;
    const left = event.clientX - this.svg.getBoundingClientRect().left;
    let best = points[0];
    for (const point of points) {
      if (Math.abs(this.place.x(point.at) - left) < Math.abs(this.place.x(best.at) - left)) best = point;
    }
    const x = this.place.x(best.at).toFixed(1);
    setAttribute(this.cursor, "x1", x);
    setAttribute(this.cursor, "x2", x);
    this.cursor.classList.add("on");
    const failed = this.second && this.second(best) > 0 ? `, ${rate(this.second(best))} failed` : "";
    setText(this.read, `${time(best.at, true)}: ${rate(this.value(best))}${failed}`);
  }

  leave() {
    this.cursor.classList.remove("on");
    setText(this.read, "");
  }
}
