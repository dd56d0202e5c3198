// Numbers, times and durations as people say them.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const tenths = new Intl.NumberFormat("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const clockTime = new Intl.DateTimeFormat("en", {
  hour: "2-digit", minute: "2-digit", hourCycle: "h23",
});
const clockSeconds = new Intl.DateTimeFormat("en", {
  hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23",
});
const dayTime = new Intl.DateTimeFormat("en", {
  weekday: "short", hour: "2-digit", minute: "2-digit", hourCycle: "h23",
});

export const count = (value) => (value == null ? "–" : whole.format(value));
export const brief = (value) => short.format(value);

export function rate(value) {
  return value >= 1000 ? whole.format(value) : tenths.format(value);
}

// Rounded down: only what is complete is 100 %.
export function percentDown(part, of) {
  return of > 0 ? tenths.format(Math.floor((1000 * part) / of) / 10) : "0.0";
}

export function share(part, of) {
  return of > 0 ? `${tenths.format((100 * part) / of)} %` : "–";
}

export function duration(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 600) return s % 60 ? `${Math.floor(s / 60)} min ${s % 60} s` : `${s / 60} min`;
  const minutes = Math.round(s / 60);
  if (minutes < 60) return `${minutes} min`;
  if (minutes < 1440) {
    const rest = minutes % 60;
    return rest ? `${Math.floor(minutes / 60)} h ${rest} min` : `${minutes / 60} h`;
  }
  const hours = Math.round(minutes / 60);
  return hours % 24 ? `${Math.floor(hours / 24)} d ${hours % 24} h` : `${hours / 24} d`;
}

export const ago = (seconds) => (seconds < 1.5 ? "just now" : `${duration(seconds)} ago`);

// A time of day; with the day once it is not within half a day of now.
export function time(ms, withSeconds = false) {
  if (Math.abs(ms - Date.now()) > 12 * 3600e3) return dayTime.format(ms);
  return (withSeconds ? clockSeconds : clockTime).format(ms);
}

export function bytes(size) {
  if (size < 1024) return `${size} bytes`;
  const units = ["KiB", "MiB", "GiB", "TiB"];
  let unit = -1;
  do { size /= 1024; unit += 1; } while (size >= 1024 && unit < units.length - 1);
  return `${tenths.format(size)} ${units[unit]}`;
}

export const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;

export const baseName = (path) => (path || "").split("/").pop();
