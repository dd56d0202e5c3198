// The points of the charts, as many as the server keeps itself: a page may stay open for weeks.

export class Series {
  constructor() {
    this.levels = new Map(); // seconds between two points -> points, oldest first
    this.reach = new Map(); // the same -> how many seconds they reach back
  }

  // Points carry times relative to the reply; here they get this browser's.
  take(levels, now) {
    for (const { every_s: every, keep, new: fresh } of levels) {
      const points = this.levels.get(every) || [];
      for (const [age, items, failed, tokens] of fresh) {
        const at = now + age * 1000;
        const last = points[points.length - 1];
        if (!last || at > last.at + every * 300) points.push({ at, items, failed, tokens });
      }
      if (points.length > keep) points.splice(0, points.length - keep);
      this.levels.set(every, points);
      this.reach.set(every, every * keep);
    }
  }

  // The points of the last seconds, of the finest level that reaches so far.
  last(seconds, now) {
    const levels = [...this.levels.keys()].sort((a, b) => a - b);
    const every = levels.find((each) => this.reach.get(each) >= seconds) || levels[0];
    const begin = now - seconds * 1000;
    return { every, points: (this.levels.get(every) || []).filter((point) => point.at >= begin) };
  }

  // How far back anything is known, in seconds.
  age(now) {
    let first = now;
    for (const points of this.levels.values()) if (points.length) first = Math.min(first, points[0].at);
    return (now - first) / 1000;
  }
}
