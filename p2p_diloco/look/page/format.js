// Numbers as text. Peers may claim any number, so every one of these is short, whatever it is given.

const NOTHING = "–";

export function count(number) {
  if (number === null || !Number.isFinite(number)) return NOTHING;
  if (Math.abs(number) < 100_000) return Math.round(number).toLocaleString("en");
  for (const unit of ["k", "M", "G", "T", "P", "E"]) {
    number /= 1000;
    if (Math.abs(number) < 999.5) return `${Number(number.toPrecision(3))} ${unit}`;
  }
  return "huge";
}

export function decimal(number, digits = 4) {
  if (number === null || !Number.isFinite(number)) return NOTHING;
  return Math.abs(number) < 1000 ? number.toFixed(digits) : number.toExponential(1);
}

export function duration(seconds) {
  for (const [unit, length] of [["day", 86_400], ["hour", 3600], ["minute", 60]]) {
    const whole = Math.floor(seconds / length);
    if (whole >= 1) return `${count(whole)} ${unit}${whole === 1 ? "" : "s"}`;
  }
  return `${Math.max(0, Math.round(seconds))} s`;
}

// `seconds` since 1970, as the time of day here.
export function clock(seconds) {
  return new Date(seconds * 1000).toTimeString().slice(0, 8);
}
