// The status page: asks the monitor every few seconds, and shows the answer.
//
// What peers choose (names, versions) comes in as text and goes into textContent, nowhere else.

import { Chart } from "./chart.js";
import { clock, count, decimal, duration } from "./format.js";

const EVERY_MS = 3000;
const PATIENCE_MS = 8000;
const MOST_ROWS = 200;
// Distances between ticks of what is counted: 1, 2, 5, 10 and so on.
const WHOLE = Array.from({ length: 18 }, (_, i) => [1, 2, 5][i % 3] * 10 ** Math.floor(i / 3));

const element = (id) => document.getElementById(id);
const show = (id, text) => {
  if (element(id).textContent !== text) element(id).textContent = text;
};

const curve = new Chart(element("curve"), {
  time: false,
  axis: [
    { label: "outer step", text: count, incrs: WHOLE },
    { text: (loss, distance) => decimal(loss, Math.min(6, Math.max(1, Math.ceil(-Math.log10(distance))))) },
  ],
  series: [
    { label: "held-out", color: "--first" },
    { label: "training", color: "--second", dash: [6, 4] },
  ],
  columns: ["Outer step", "Held-out loss", "Training loss"],
  text: [count, (loss) => decimal(loss), (loss) => decimal(loss)],
});
const pace = new Chart(element("pace"), {
  time: true,
  axis: [
    { label: "time", text: (at, distance) => (distance < 60 ? clock(at) : clock(at).slice(0, 5)), space: 72 },
    { text: count, range: (_, least, most) => [0, 1.1 * (most || 1)] },
  ],
  series: [{ label: "tokens/s", color: "--first" }],
  columns: ["Time", "Tokens/s", "Peers"],
  text: [clock, count, count],
});

let answeredAt = 0;

async function ask() {
  try {
    const answer = await fetch("api/status.json", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    if (!answer.ok) throw new Error(`${answer.status}`);
    render(await answer.json());
    answeredAt = Date.now();
  } catch (error) {
    const since = answeredAt ? `; this is from ${duration((Date.now() - answeredAt) / 1000)} ago` : "";
    health("lost", `the monitor does not answer${since}`);
    console.debug(error);
  }
}

function health(state, text) {
  element("health").dataset.health = state;
  show("health-text", text);
}

function render(status) {
  const { run } = status;
  document.title = `${run.name} · p2p-diloco`;
  show("run-name", run.name);
  show("goal", `${count(run.n_params)} parameters; the goal is ${count(run.steps)} outer steps`);
  if (!status.up) health("blind", "no peer is there");
  else if (status.heads > 1) health("split", `${status.heads} heads: the peers disagree`);
  else if (status.waits_for_owner) health("owner", "waiting for the owner's seed");
  else health("live", "live");
  renderProgress(status);
  renderCertificate(status);
  renderFigures(status);
  renderCharts(status);
  renderJoin(status);
  renderRows(status);
  renderSeats(status);
}

function renderProgress({ run, step, step_since_s, now_s, held_out_loss, held_out_step, anchored_step }) {
  element("progress").max = run.steps;
  element("progress").value = step;
  const made = step && step_since_s !== null ? `, the last one ${duration(now_s - step_since_s)} ago` : "";
  const anchored = anchored_step ? `; anchored up to ${count(anchored_step)}` : "";
  show("progress-text", `${count(step)} of ${count(run.steps)}${made}${anchored}`);
  const news = `Outer step ${count(held_out_step)}: held-out loss ${decimal(held_out_loss)}`;
  show("news", held_out_loss === null ? "" : news);
}

function renderCertificate({ certificate, known_members, waits_for_owner, found_wrong, barred }) {
  const told = [];
  if (certificate) {
    told.push(`${count(certificate.signatures)} of ${count(certificate.certifying)} signed the last outer step`);
    if (certificate.witnessed) told.push("witnessed by the owner");
    if (certificate.helped) told.push("averaged by the owner's seed");
  }
  if (known_members) told.push(`${count(known_members)} ${known_members === 1 ? "member is" : "members are"} known`);
  if (waits_for_owner) told.push("waiting for the owner's seed, which has to witness the next one");
  if (found_wrong) told.push(`${count(found_wrong)} found to have averaged wrongly`);
  if (barred) told.push(`${count(barred)} barred for signing two of one thing`);
  show("certificate", told.join("; "));
}

function renderFigures({ run, held_out_loss, tokens_per_s, peers, tokens }) {
  show("held-out", decimal(held_out_loss));
  const bits = held_out_loss === null ? "" : `; ${decimal(held_out_loss / Math.LN2, 3)} bits per byte`;
  show("held-out-note", `nats per token${run.byte_level ? bits : ""}`);
  show("speed", count(tokens_per_s));
  show("tokens", count(tokens));
  const all = Object.values(peers).reduce((sum, number) => sum + number, 0);
  show("peers", count(all));
  const names = { training: "training", round: "in a round", joining: "joining" };
  names.seed = peers.seed === 1 ? "seed" : "seeds";
  const there = Object.entries(peers).filter(([, number]) => number);
  show("peers-note", there.map(([state, number]) => `${count(number)} ${names[state]}`).join(", "));
}

function renderCharts({ curve: points, pace: speeds, tokens_per_s, peers }) {
  const evaluated = points.step.map((step, i) => [step, points.held_out_loss[i]]).filter(([, loss]) => loss !== null);
  const [first, last] = [evaluated[0], evaluated.at(-1)];
  let sentence = "Not evaluated yet.";
  if (evaluated.length === 1) sentence = `Held-out loss ${decimal(last[1])} at outer step ${count(last[0])}.`;
  if (evaluated.length > 1) {
    const [from, to] = [first, last].map(([step, loss]) => `${decimal(loss)} at outer step ${count(step)}`);
    sentence = `Held-out loss: ${last[1] < first[1] ? "down" : "up"} from ${from} to ${to}.`;
  }
  curve.update([points.step, points.held_out_loss, points.loss], sentence);
  const now = `${count(tokens_per_s)} tokens per second now, by ${count(peers.training + peers.round)} that train.`;
  pace.update([speeds.at_s, speeds.tokens_per_s, speeds.peers], now);
}

function renderJoin({ run, join_line, join_note, by_invitation }) {
  element("invited").hidden = !by_invitation;
  show("run-id", run.id);
  show("join-line", join_line || "no peer that others can reach is there now");
  show("join-note", join_note);
  element("copy").disabled = !join_line;
}

function renderRows({ rows, tokens, known_members }) {
  const body = element("rows").tBodies[0];
  body.replaceChildren(...rows.slice(0, MOST_ROWS).map((peer) => rowOf(peer, tokens, known_members)));
  show("rows-note", rows.length > MOST_ROWS ? `and ${rows.length - MOST_ROWS} more` : rows.length ? "" : "nobody");
}

function renderSeats({ by_invitation, seats }) {
  element("seats").hidden = !by_invitation;
  const lines = seats.slice(0, MOST_ROWS).map((seat) => {
    const line = document.createElement("tr");
    const name = cell("th", seat.name);
    name.scope = "row";
    const until = new Date(seat.expires_s * 1000).toISOString().slice(0, 10);
    line.append(name, cell("td", count(seat.peers), "number"), cell("td", count(seat.places), "number"));
    line.append(cell("td", until));
    return line;
  });
  element("seats").querySelector("tbody").replaceChildren(...lines);
}

function rowOf(peer, allTokens, knownMembers) {
  const trains = peer.role === "trainer";
  const line = document.createElement("tr");
  const name = cell("th", peer.name);
  name.scope = "row";
  name.title = peer.peer;
  const id = document.createElement("small");
  const about = [`…${peer.peer.slice(-8)}`, peer.invitation];
  if (trains && knownMembers) about.push(peer.known ? "known" : "newcomer");
  if (peer.reached !== "direct") about.push(peer.reached === "relay" ? "through a relay only" : "cannot be dialled");
  if (peer.share_percent === 0) about.push("averages nothing: its uplink is slow");
  else if (peer.share_percent !== 100) about.push(`averages ${count(peer.share_percent)} % of an equal share`);
  id.textContent = about.filter(Boolean).join(" · ");
  name.append(id);
  const state = cell("td", "");
  const pill = document.createElement("span");
  pill.className = "pill";
  pill.dataset.state = peer.state;
  pill.textContent = peer.state;
  state.append(pill);
  const inner = trains && peer.planned ? `${count(peer.inner_step)}/${count(peer.planned)}` : "–";
  const contributed = cell("td", trains ? count(peer.tokens) : "–", "number");
  if (trains && allTokens) contributed.append(share(peer.tokens / allTokens));
  line.append(
    name,
    state,
    cell("td", trains ? count(peer.tokens_per_s) : "–", "number"),
    contributed,
    cell("td", count(peer.step), "number"),
    cell("td", inner, "number"),
    cell("td", decimal(peer.loss), "number"),
    cell("td", peer.version),
  );
  return line;
}

function share(part) {
  const text = document.createElement("small");
  text.textContent = `${(100 * part).toFixed(0)} %`;
  const bar = document.createElement("span");
  bar.className = "bar";
  bar.style.inlineSize = `${100 * part}%`;
  text.prepend(bar);
  return text;
}

function cell(kind, text, className = "") {
  const item = document.createElement(kind);
  item.textContent = text;
  item.className = className;
  return item;
}

async function copyJoinLine() {
  const text = element("join-line").textContent;
  try {
    await navigator.clipboard.writeText(text); // only there on https and on this machine
  } catch {
    getSelection().selectAllChildren(element("join-line"));
    document.execCommand("copy");
  }
  show("copy", "Copied");
  setTimeout(() => show("copy", "Copy"), 2000);
}

async function live() {
  for (;;) {
    if (!document.hidden) await ask();
    await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
  }
}

element("copy").addEventListener("click", copyJoinLine);
document.addEventListener("visibilitychange", () => document.hidden || ask());
live();
