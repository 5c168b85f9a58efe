"use strict";
// The explorer. Text of users enters the document by textContent alone (`h` makes text nodes), never as HTML.

// -- small tools ------------------------------------------------------------------------------------------------------

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "disabled") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((one) => one !== null && one !== undefined && one !== false));
  return element;
}
const put = (element, ...children) => { element.replaceChildren(); return fill(element, {}, children); };
const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

const whole = new Intl.NumberFormat("en");
const clock = (time) => new Date(1000 * time).toLocaleTimeString("en-GB");
const number = (value) => whole.format(Math.round(value));
const percent = (value) => `${(100 * value).toFixed(value > 0.995 || value === 0 ? 0 : 1)} %`;
function short(value) {
  if (value >= 1e6) return `${(value / 1e6).toFixed(1)} M`;
  return value >= 1e4 ? `${(value / 1e3).toFixed(value >= 1e5 ? 0 : 1)} k` : number(value);
}
function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 0.001) return `${(1e6 * value).toFixed(0)} µs`;
  if (value < 1) return `${(1e3 * value).toFixed(value < 0.01 ? 1 : 0)} ms`;
  if (value < 120) return `${value.toFixed(value < 10 ? 2 : 0)} s`;
  return value < 7200 ? `${Math.floor(value / 60)} min` : `${(value / 3600).toFixed(1)} h`;
}
const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "→");
const plural = (count, one) => `${number(count)} ${one}${Math.round(count) === 1 ? "" : "s"}`;

function stored(name, value) {  // storage may be forbidden
  try {
    const place = name === "key" ? sessionStorage : localStorage;
    if (value === undefined) return place.getItem(`ramet-${name}`) ?? "";
    place.setItem(`ramet-${name}`, value);
  } catch { /* it lasts as long as the page */ }
  return value ?? "";
}

const probe = h("i", { hidden: true });
let colours = {};
function colour(name) {
  if (!colours[name]) {
    probe.style.color = `var(--${name})`;
    colours[name] = getComputedStyle(probe).color;
  }
  return colours[name];
}
const parts = (rgb) => rgb.match(/[\d.]+/g).slice(0, 3).map(Number);
function between(from, to, share) {
  const a = parts(colour(from)), b = parts(colour(to));
  return `rgb(${a.map((value, i) => Math.round(value + (b[i] - value) * share)).join(",")})`;
}

// -- what the server told ---------------------------------------------------------------------------------------------

const KEPT = 300;  // frames: five minutes
const state = {
  key: stored("key"), frame: null, history: [], engine: 0, trees: new Map(), steps: new Map(), shapes: new Map(),
  evictions: [], run: undefined, problem: null, view: null,
};

class Refused extends Error {}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (state.key) headers.Authorization = `Bearer ${state.key}`;
  if (options.json !== undefined) {
    headers["Content-Type"] = "application/json";
    options = { ...options, method: options.method ?? "POST", body: JSON.stringify(options.json) };
  }
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try { message = (await response.json()).error.message; } catch { /* no error of this server */ }
  const error = new Refused(message);
  error.status = response.status;
  throw error;
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      const events = rest.split("\n\n");
      rest = events.pop();
      for (const event of events) {
        let name = "message", data = "";
        for (const line of event.split("\n")) {
          if (line.startsWith("event: ")) name = line.slice(7);
          if (line.startsWith("data: ")) data += line.slice(6);
        }
        if (data) yield [name, data];
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

let stream = null;  // the controller that ends the one stream
async function follow() {
  const place = new URLSearchParams();
  if (state.view?.run) {
    place.set("run", state.view.run);
    place.set("row", state.view.row);
  }
  const mine = stream = new AbortController();
  for (let wait = 500; stream === mine; wait = Math.min(2 * wait, 8000)) {
    try {
      const response = await ask(`/ui/events?${place}`, { signal: mine.signal });
      state.trees.clear();
      state.shapes.clear();
      for await (const [, data] of eventsOf(response)) {
        if (stream !== mine) return;
        const frame = JSON.parse(data);
        if (frame.error) throw new Refused(frame.error.message);
        wait = 500;
        take(frame);
      }
      throw new Refused("the server closed the stream");
    } catch (error) {
      if (stream !== mine) return;
      if (error.status === 401) {
        problem("this server wants a key");
        askKey();
        return;
      }
      problem(error instanceof Refused ? error.message : "the server does not answer");
    }
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}

function problem(text) {
  state.problem = text;
  showStatus();
}

function take(frame) {
  state.problem = null;
  state.frame = frame;
  if ("run" in frame) state.run = frame.run;
  for (const engine of frame.engines) {
    const id = engine.number ?? 0;
    if (engine.tree) state.trees.set(id, readTree(engine.tree));
    if (!engine.activity) continue;
    const steps = state.steps.get(id) ?? [];
    for (const [end, took, decode, rows, tokens] of engine.activity.steps) {
      steps.push({ end: frame.time_s - (engine.activity.now_s - end), took, decode, rows, tokens });
    }
    const old = steps.findIndex((step) => step.end > frame.time_s - 60);
    state.steps.set(id, old < 0 ? [] : steps.slice(old));
    for (const [start, size, text] of engine.activity.evictions) {
      state.evictions.unshift({ time: frame.time_s, start, size, text });
    }
  }
  state.evictions.length = Math.min(state.evictions.length, 60);
  const listed = new Set();
  for (const program of frame.programs) {
    listed.add(program.id);
    if (program.shape) state.shapes.set(program.id, workGraph(program.shape.map(([kind, label, needs]) => ({ kind, label, needs }))));
  }
  for (const id of state.shapes.keys()) if (!listed.has(id)) state.shapes.delete(id);
  state.history.push(measured(frame));
  if (state.history.length > KEPT) state.history.shift();
  showStatus();
  showEngines(frame);
  $("model").textContent = frame.server.name;
  requestAnimationFrame(() => state.view?.update?.(frame));
}

const total = (frame, name) => frame.engines.reduce((sum, engine) => sum + (engine.stats[name] ?? 0), 0);

function measured(frame) {
  const before = state.history.at(-5) ?? state.history[0];
  const now = {
    time: frame.time_s, histograms: frame.histograms,
    running: total(frame, "num_running"), waiting: total(frame, "num_waiting"),
    decoded: total(frame, "num_decoded_tokens"), computed: total(frame, "num_computed_tokens"),
    cached: total(frame, "num_cached_tokens"), evicted: total(frame, "num_evicted_pages"),
    pages: total(frame, "num_pages"), free: total(frame, "num_free_pages"), evictable: total(frame, "num_evictable_pages"),
    hits: frame.hit_rates.length ? frame.hit_rates.reduce((a, b) => a + b, 0) / frame.hit_rates.length : 0,
  };
  const passed = before ? Math.max(now.time - before.time, 0.1) : 0;
  for (const name of ["decoded", "computed", "evicted"]) {
    now[`${name}Rate`] = before ? Math.max(0, now[name] - before[name]) / passed : 0;
  }
  const past = state.history.at(-30)?.histograms;
  for (const name of ["first_token", "gap", "queue", "grammar"]) {
    now[name] = [0.5, 0.95].map((share) => quantile(frame.histograms[name], past?.[name], share));
  }
  return now;
}

function quantile(counts, before, share) {  // counts up to each bound, as Prometheus has them
  const since = counts.map(([bound, count], i) => [bound === "+Inf" ? Infinity : Number(bound), count - (before?.[i][1] ?? 0)]);
  const all = since.at(-1)[1];
  if (all <= 0) return null;
  let low = 0, under = 0;
  for (const [bound, count] of since) {
    if (count >= share * all) {
      if (bound === Infinity) return low;
      return low + (bound - low) * (share * all - under) / Math.max(count - under, 1e-9);
    }
    [low, under] = [bound, count];
  }
  return low;
}

// -- head -------------------------------------------------------------------------------------------------------------

const VIEWS = [["/", "Overview"], ["/cache", "Cache"], ["/runs", "Runs"], ["/play", "Playground"], ["/api", "API"]];
const isDocs = location.pathname.endsWith("/docs");

function showStatus() {
  const pill = $("status");
  let text = "connecting", kind = "";
  if (state.problem) [text, kind] = [state.problem, "bad"];
  else if (isDocs) text = "";
  else if (state.frame) {
    const unready = state.frame.engines.find((engine) => !engine.ready);
    const silent = state.frame.engines.find((engine) => !engine.activity);
    if (unready) [text, kind] = [`starting: ${unready.stage}`, "warn"];
    else if (silent) [text, kind] = ["the engine does not answer", "bad"];
    else [text, kind] = ["live", "good"];
  }
  if (pill.textContent !== text) pill.textContent = text;
  pill.className = `pill ${kind}`;
  pill.hidden = !text;
}

function showEngines(frame) {
  const choice = $("engine");
  $("engine-choice").hidden = frame.engines.length < 2;
  if (choice.options.length !== frame.engines.length) {
    choice.replaceChildren(...frame.engines.map((engine) => h("option", { value: engine.number ?? 0 }, String(engine.number ?? 0))));
  }
}
const chosen = (map) => map.get(Number(state.engine)) ?? map.values().next().value;

function askKey() {
  const dialog = $("key-dialog");
  if (dialog.open) return;
  $("key").value = state.key;
  dialog.showModal();
}

function themed(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  $("theme").textContent = name[0].toUpperCase() + name.slice(1);
  stored("theme", name);
  colours = {};
  if (state.frame) state.view?.update?.(state.frame);
}
const nextTheme = () => themed({ auto: "dark", dark: "light", light: "auto" }[stored("theme") || "auto"]);

// -- charts -----------------------------------------------------------------------------------------------------------

function prepare(canvas, height, wide = 0) {  // wide: its width, where asking for it would lay out the page once more
  const width = wide || canvas.clientWidth || 300, scale = devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.height = `${height}px`;
  }
  const draw = canvas.getContext("2d");
  draw.setTransform(scale, 0, 0, scale, 0, 0);
  draw.clearRect(0, 0, width, height);
  return [draw, width, height];
}

// A chart of the last minutes. lines: [{name, colour, of: (measured) => number or null}]; shown: number -> text.
function chart(title, lines, shown, { most = 0, stacked = false } = {}) {
  const canvas = h("canvas", { role: "img" });
  const values = lines.map(() => h("span", {}));
  const caption = h("figcaption", {}, h("b", {}, title), lines.map((line, i) => h("span", {}, h("i", { class: line.colour[1] }), `${line.name} `, values[i])));
  const element = h("div", { class: "panel" }, h("figure", {}, caption, canvas));
  function update() {
    const [draw, width, height] = prepare(canvas, 92);
    const history = state.history, end = history.at(-1)?.time ?? 0;
    const rows = lines.map((line) => history.map((one) => line.of(one)));
    if (stacked) for (let i = 1; i < rows.length; i++) rows[i] = rows[i].map((value, j) => value + rows[i - 1][j]);
    const highest = Math.max(most, ...rows.flat().filter((value) => value !== null)), top = highest > 0 ? highest * 1.08 : 1;
    const x = (time) => width - (end - time) * width / KEPT;
    const y = (value) => height - 14 - value * (height - 20) / top;
    draw.strokeStyle = colour("line");
    draw.fillStyle = colour("soft");
    draw.font = "10px system-ui, sans-serif";
    for (const share of [0, 0.5, 1]) {
      draw.beginPath();
      draw.moveTo(0, y(top * share / 1.08));
      draw.lineTo(width, y(top * share / 1.08));
      draw.stroke();
    }
    draw.fillText(highest > 0 ? shown(highest) : "nothing yet", 3, y(top / 1.08) + 10);
    draw.fillText("5 min ago", 3, height - 2);
    draw.fillText("now", width - 22, height - 2);
    for (let i = rows.length - 1; i >= 0; i--) {
      draw.strokeStyle = draw.fillStyle = colour(lines[i].colour[0]);
      draw.lineWidth = 1.6;
      draw.beginPath();
      let last = null, first = null;
      rows[i].forEach((value, j) => {
        if (value === null) { last = null; return; }
        const at = x(history[j].time);
        if (last === null) draw.moveTo(at, y(value)); else draw.lineTo(at, y(value));
        first ??= at;
        last = at;
      });
      draw.stroke();
      if (stacked && last !== null) {
        draw.lineTo(last, y(0));
        draw.lineTo(first, y(0));
        draw.globalAlpha = 0.35;
        draw.fill();
        draw.globalAlpha = 1;
      }
    }
    lines.forEach((line, i) => {
      const value = history.length ? line.of(history.at(-1)) : null;
      values[i].textContent = value === null ? "–" : shown(value);
    });
    canvas.setAttribute("aria-label", `${title}: ${lines.map((line, i) => `${line.name} ${values[i].textContent}`).join(", ")}`);
  }
  return { element, update };
}
const C = { decode: ["decode", "c0"], prompt: ["prompt", "c1"], good: ["good", "c2"], soft: ["soft", "c3"], bad: ["bad", "c4"], line: ["line", "c5"], hot: ["hot", "c6"] };

function timeline() {
  const SPAN = 30, canvas = h("canvas", { role: "img", tabindex: 0 }), said = h("span", {});
  const tip = tooltip(canvas, (x, y, width) => {
    const time = (state.frame?.time_s ?? 0) - SPAN * (1 - x / width);
    const step = (chosen(state.steps) ?? []).find((one) => one.end - one.took <= time && time <= one.end);
    return step ? `${seconds(step.took)}: ${plural(step.decode, "decode row")}, ${plural(step.tokens, "prompt token")} of ${plural(step.rows, "request")}` : "";
  });
  const element = h("div", { class: "panel" }, h("figure", {},
    h("figcaption", {}, h("b", {}, "Steps of the last 30 seconds"), said), canvas),
    h("div", { class: "legend" }, h("span", { class: "c0" }, h("i", {}), "decode rows"), h("span", { class: "c2" }, h("i", {}), "the model runs"),
      h("span", { class: "c4" }, h("i", {}), "gap between steps"), h("span", { class: "c1" }, h("i", {}), "tokens of prompts")));
  function update(frame) {
    const [draw, width, height] = prepare(canvas, 150), steps = chosen(state.steps) ?? [];
    const start = frame.time_s - SPAN, x = (time) => (time - start) * width / SPAN;
    const shownSteps = steps.filter((step) => step.end > start);
    const rows = Math.max(1, ...shownSteps.map((step) => step.decode)), tokens = Math.max(1, ...shownSteps.map((step) => step.tokens));
    const middle = 74;
    draw.strokeStyle = colour("line");
    draw.strokeRect(0.5, middle - 4.5, width - 1, 9);
    let busy = 0, last = null;
    for (const step of shownSteps) {
      const left = x(step.end - step.took), size = Math.max(x(step.end) - left, 0.7);
      const drawn = size > 2.5 ? size - 0.5 : size;
      busy += step.took;
      if (last !== null && step.end - step.took - last > 0.002 && step.end - step.took - last < 1) {
        draw.fillStyle = colour("bad");
        draw.fillRect(x(last), middle - 4, Math.max(left - x(last), 0.7), 8);
      }
      draw.fillStyle = colour("good");
      draw.fillRect(left, middle - 4, drawn, 8);
      if (step.decode) {
        const tall = 60 * step.decode / rows;
        draw.fillStyle = colour("decode");
        draw.fillRect(left, middle - 8 - tall, drawn, tall);
      }
      if (step.tokens) {
        const tall = Math.max(2, 52 * step.tokens / tokens);
        draw.fillStyle = colour("prompt");
        draw.fillRect(left, middle + 8, drawn, tall);
      }
      last = step.end;
    }
    draw.fillStyle = colour("soft");
    draw.font = "10px system-ui, sans-serif";
    if (shownSteps.length) {
      draw.fillText(`up to ${plural(rows, "row")}`, 3, 10);
      draw.fillText(`up to ${plural(tokens, "token")}`, 3, height - 16);
    }
    for (let back = 25; back > 0; back -= 5) draw.fillText(`–${back} s`, x(frame.time_s - back) - 8, height - 2);
    said.textContent = shownSteps.length
      ? `${number(shownSteps.length)} steps, busy ${percent(Math.min(1, busy / SPAN))}, median ${seconds(shownSteps.map((step) => step.took).sort((a, b) => a - b)[shownSteps.length >> 1])}`
      : "no step: the engine is idle";
    canvas.setAttribute("aria-label", `Steps: ${said.textContent}`);
    tip();
  }
  return { element, update };
}

function tooltip(target, textAt) {
  const box = h("div", { class: "tip", hidden: true });
  let place = null;
  function show() {
    const text = place && target.isConnected ? textAt(place.x, place.y, target.clientWidth) : "";
    box.hidden = !text;
    if (!text) { box.remove(); return; }
    if (!box.isConnected) document.body.append(box);
    box.textContent = text;
    box.style.left = `${Math.min(place.clientX + 12, innerWidth - 320)}px`;
    box.style.top = `${Math.min(place.clientY + 14, innerHeight - 90)}px`;
  }
  target.addEventListener("pointermove", (event) => {
    place = { x: event.offsetX, y: event.offsetY, clientX: event.clientX, clientY: event.clientY };
    show();
  });
  target.addEventListener("pointerleave", () => { place = null; show(); });
  return show;
}

// -- overview ---------------------------------------------------------------------------------------------------------

function overview() {
  const names = ["running", "waiting", "programs", "tokens a second", "prompt tokens a second", "prompt from cache", "cache in use", "first token, median"];
  const tiles = names.map((name) => ({ name, value: h("b", {}, "–") }));
  const charts = [
    chart("Requests", [{ name: "running", colour: C.decode, of: (m) => m.running }, { name: "waiting", colour: C.prompt, of: (m) => m.waiting }], number, { most: 1 }),
    chart("Tokens a second", [{ name: "decoded", colour: C.decode, of: (m) => m.decodedRate }, { name: "prompts", colour: C.prompt, of: (m) => m.computedRate }], short, { most: 1 }),
    chart("Hit rate of the last minute", [{ name: "", colour: C.good, of: (m) => m.hits }], percent, { most: 1 }),
    chart("First token", [{ name: "p50", colour: C.decode, of: (m) => m.first_token[0] }, { name: "p95", colour: C.hot, of: (m) => m.first_token[1] }], seconds),
    chart("Gap between tokens", [{ name: "p50", colour: C.decode, of: (m) => m.gap[0] }, { name: "p95", colour: C.hot, of: (m) => m.gap[1] }], seconds),
    chart("Wait in the queue", [{ name: "p50", colour: C.decode, of: (m) => m.queue[0] }, { name: "p95", colour: C.hot, of: (m) => m.queue[1] }], seconds),
    chart("Wait for a grammar", [{ name: "p50", colour: C.decode, of: (m) => m.grammar[0] }, { name: "p95", colour: C.hot, of: (m) => m.grammar[1] }], seconds),
    chart("Pages of the cache", [{ name: "in use", colour: C.hot, of: (m) => m.pages - m.free - m.evictable }, { name: "cached", colour: C.good, of: (m) => m.evictable }, { name: "free", colour: C.line, of: (m) => m.free }], short, { stacked: true, most: 1 }),
    chart("Evicted pages a second", [{ name: "", colour: C.bad, of: (m) => m.evictedRate }], short, { most: 1 }),
  ];
  const steps = timeline(), causes = h("div", {}), misses = h("div", { class: "scroll" });
  const element = h("div", {}, h("h1", { class: "skip" }, "Overview"),
    h("div", { class: "tiles" }, tiles.map((tile) => h("div", { class: "tile" }, tile.value, h("span", {}, tile.name)))),
    steps.element, h("div", { class: "grid" }, charts.map((one) => one.element)),
    h("div", { class: "split" },
      h("section", { class: "panel" }, h("h2", {}, "Where prompts left the nearest recent one"), misses),
      h("section", { class: "panel" }, h("h2", {}, "Misses by cause"), causes)));
  let told = "";
  function update(frame) {
    const now = state.history.at(-1);
    const used = now.pages ? (now.pages - now.free - now.evictable) / now.pages : 0;
    [number(now.running), number(now.waiting), number(frame.num_programs), short(now.decodedRate), short(now.computedRate), percent(now.hits), percent(used), seconds(now.first_token[0])]
      .forEach((text, i) => { tiles[i].value.textContent = text; });
    steps.update(frame);
    for (const one of charts) one.update();
    const key = JSON.stringify([frame.misses, frame.last_misses]);
    if (key === told) return;
    told = key;
    const counts = Object.entries(frame.misses).sort((a, b) => b[1] - a[1]), most = counts[0]?.[1] ?? 1;
    causes.replaceChildren(...counts.map(([kind, count]) => {
      const bar = h("div", {});
      bar.style.width = `${100 * count / most}%`;
      return h("div", { class: "bar" }, h("span", {}, kind), bar, h("span", {}, number(count)));
    }));
    if (!counts.length) causes.append(h("p", { class: "empty" }, "No chat's prompt has left the one before it yet."));
    misses.replaceChildren(frame.last_misses.length ? h("table", {}, h("thead", {}, h("tr", {}, ["when", "message", "what both have there", "same text, then this prompt's own"].map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, frame.last_misses.toReversed().map((miss) => h("tr", {}, h("td", {}, clock(miss.time_s)), h("td", {}, miss.message ?? "–"), h("td", {}, miss.kind ?? "other"),
        h("td", { class: "mono" }, h("span", { class: "soft" }, `…${visible(miss.before)}`), h("mark", {}, visible(miss.text))))))) : h("p", { class: "empty" }, frame.viewer.is_admin ? "Nothing yet: a chat shows up here when its prompt begins like an earlier one and then differs." : "Nothing of yours yet."));
  }
  return { element, update };
}

// -- cache ------------------------------------------------------------------------------------------------------------

function readTree(tree) {
  const size = tree.above?.length ?? 0, below = Array.from({ length: size }, () => []), roots = [];
  const wide = Array.from(tree.num_tokens ?? []), depth = new Array(size).fill(0);
  for (let i = 0; i < size; i++) {
    const above = tree.above[i];
    if (above === null) roots.push(i);
    else {
      below[above].push(i);
      depth[i] = depth[above] + 1;
    }
  }
  for (let i = size - 1; i >= 0; i--) if (tree.above[i] !== null) wide[tree.above[i]] += wide[i];
  for (const children of below) children.sort((a, b) => wide[b] - wide[a]);
  const last = Math.max(1, ...sampled(tree.last_used ?? []));
  return { ...tree, size, below, roots, wide, depth, last, tokens: roots.reduce((sum, root) => sum + wide[root], 0), clock: order(tree.last_used ?? []) };
}
const sampled = (values) => values.length > 50000 ? values.filter((_, i) => i % 10 === 0) : values;
function order(uses) {  // use -> its rank among all, 0 coldest and 1 hottest
  const distinct = [...new Set(uses)].sort((a, b) => a - b), most = Math.max(distinct.length - 1, 1);
  return new Map(distinct.map((use, i) => [use, distinct.length === 1 ? 1 : i / most]));
}

function cache() {
  const ROW = 24, canvas = h("canvas", { role: "application", tabindex: 0, "aria-label": "The tree of cached prefixes", "aria-describedby": "tree-keys" });
  const said = h("span", {}), details = h("div", { "aria-live": "polite" }), largest = h("tbody", {}), gone = h("div", { class: "scroll low" });
  const pages = chart("Pages of the cache", [{ name: "in use", colour: C.hot, of: (m) => m.pages - m.free - m.evictable }, { name: "cached", colour: C.good, of: (m) => m.evictable }, { name: "free", colour: C.line, of: (m) => m.free }], short, { stacked: true, most: 1 });
  const evicted = chart("Evicted pages a second", [{ name: "", colour: C.bad, of: (m) => m.evictedRate }], short, { most: 1 });
  const element = h("div", {}, h("h1", {}, "Cached prefixes"),
    h("div", { class: "panel" }, h("figure", {}, h("figcaption", {}, h("b", {}, "Radix tree: every bar is a run of tokens; what follows it stands below"), said), canvas),
      h("div", { class: "legend" }, h("span", { class: "c6" }, h("i", {}), "used just now"), h("span", {}, h("i", { class: "cold" }), "longest unused"), h("span", { class: "c0" }, h("i", {}), "frame: read by a running request"), h("span", { id: "tree-keys" }, "click or Enter: zoom in; Esc: zoom out; arrows: walk"))),
    h("div", { class: "split" },
      h("section", { class: "panel" }, h("h2", {}, "Largest segments"), h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col", class: "n" }, "tokens"), h("th", { scope: "col", class: "n" }, "from"), h("th", { scope: "col", class: "n" }, "heat"), h("th", { scope: "col", class: "n" }, "below"), h("th", { scope: "col" }, "read by"), h("th", { scope: "col" }, "begins"))), largest))),
      h("section", { class: "panel" }, h("h2", {}, "Chosen segment"), details)),
    h("div", { class: "grid" }, pages.element, evicted.element, h("section", { class: "panel" }, h("h2", {}, "Last evictions"), gone)));
  let tree = null, root = null, focus = null, boxes = [], told = null;

  const heat = (i) => tree.clock.get(tree.last_used[i]) ?? 0;
  const textOf = (i) => tree.above[i] === null ? `namespace ${JSON.stringify(tree.salts[i] ?? "")}` : tree.texts[i];
  function readers(i) {
    const engine = state.frame.engines.find((one) => (one.number ?? 0) === Number(state.engine)) ?? state.frame.engines[0];
    return (engine?.activity?.readers ?? []).filter((one) => one[3] !== null && one[3] === tree.last_page[i]);
  }
  function layout(width) {
    boxes = [];
    const tops = root === null ? tree.roots : [root], all = tops.reduce((sum, i) => sum + tree.wide[i], 0) || 1;
    let rows = 1;
    const visit = (i, left, scale, level) => {  // a row a level; what would be thinner than a third of a pixel is left out
      const size = tree.wide[i] * scale;
      if (size < 0.3 && level > 0) return false;
      boxes.push({ i, left, size, level });
      rows = Math.max(rows, level + 1);
      let at = left;
      for (const child of tree.below[i]) {
        if (!visit(child, at, scale, level + 1)) {
          const thin = tree.below[i].slice(tree.below[i].indexOf(child));  // they are sorted: all others are thinner
          boxes.push({ i: null, left: at, size: thin.reduce((sum, one) => sum + tree.wide[one], 0) * scale, level: level + 1, above: i, thin, scale });
          rows = Math.max(rows, level + 2);
          break;
        }
        at += tree.wide[child] * scale;
      }
      return true;
    };
    let left = 0;
    for (const top of tops) {
      visit(top, left, width / all, 0);
      left += tree.wide[top] * width / all;
    }
    return rows;
  }
  function draw() {
    const width = canvas.clientWidth || 600, rows = Math.min(layout(width), 40);
    const [pen] = prepare(canvas, Math.max(rows, 3) * ROW);
    pen.font = "11px system-ui, sans-serif";
    for (const box of boxes) {
      if (box.level >= 40) continue;
      const top = box.level * ROW, size = box.size > 3 ? box.size - 1 : box.size;
      if (box.i === null) {  // many thin ones together
        let at = box.left, from = box.left, hottest = 0;
        for (const child of box.thin) {
          at += tree.wide[child] * box.scale;
          hottest = Math.max(hottest, heat(child));
          if (at - from < 1 && child !== box.thin.at(-1)) continue;
          pen.fillStyle = between("cold", "hot", hottest);
          pen.fillRect(from, top, Math.max(at - from, 0.5), ROW - 2);
          [from, hottest] = [at, 0];
        }
        if (size > 150) {
          pen.fillStyle = colour("text");
          pen.fillText(`${number(box.thin.length)} small segments`, box.left + 6, top + 15);
        }
        continue;
      }
      pen.globalAlpha = tree.is_dead[box.i] ? 0.4 : 1;
      pen.fillStyle = tree.above[box.i] === null ? colour("hover") : between("cold", "hot", heat(box.i));
      pen.fillRect(box.left, top, size, ROW - 2);
      pen.globalAlpha = 1;
      if (tree.refs[box.i] && size > 2 && tree.above[box.i] !== null) {
        pen.strokeStyle = colour("decode");
        pen.lineWidth = 2;
        pen.strokeRect(box.left + 1, top + 1, size - 2, ROW - 4);
      }
      if (box.i === focus) {
        pen.strokeStyle = colour("text");
        pen.lineWidth = 2;
        pen.strokeRect(box.left + 1, top + 1, Math.max(size - 2, 2), ROW - 4);
      }
      if (size > 34) {
        const said = tree.above[box.i] === null ? `${tree.salts[box.i] ? `namespace ${tree.salts[box.i]}: ` : ""}${number(tree.wide[box.i])} tokens` : `${number(tree.num_tokens[box.i])}  ${visible(tree.texts[box.i] ?? "")}`;
        pen.save();
        pen.beginPath();
        pen.rect(box.left + 3, top, size - 6, ROW);
        pen.clip();
        pen.fillStyle = tree.above[box.i] !== null && heat(box.i) > 0.55 && !isDark() ? "#fff" : colour("text");
        pen.fillText(said, box.left + 6, top + 15);
        pen.restore();
      }
    }
    if (!tree.size) {
      pen.fillStyle = colour("soft");
      pen.fillText("Nothing is cached.", 6, 18);
    }
  }
  const isDark = () => parts(colour("bg"))[0] < 80;
  function describe() {
    if (focus === null || !tree || focus >= tree.size) {
      put(details, h("p", { class: "empty" }, "Choose a segment of the tree, or a line of the table."));
      return;
    }
    const who = readers(focus), path = [];
    for (let i = focus; i !== null; i = tree.above[i]) path.unshift(i);
    put(details, h("dl", {},
      h("dt", {}, "tokens"), h("dd", {}, `${number(tree.num_tokens[focus])}, from position ${number(tree.start[focus])}`),
      h("dt", {}, "below"), h("dd", {}, `${plural(tree.below[focus].length, "branch").replace("branchs", "branches")}, ${number(tree.wide[focus] - tree.num_tokens[focus])} tokens`),
      h("dt", {}, "heat"), h("dd", {}, `${percent(heat(focus))} of the segments' uses are older${tree.is_dead[focus] ? "; dead: evicted first" : ""}`),
      h("dt", {}, "locks"), h("dd", {}, tree.refs[focus] ? `${number(tree.refs[focus])}: it cannot be evicted` : "none: it may be evicted"),
      h("dt", {}, "read by"), h("dd", {}, who.length ? who.map(([id]) => h("div", { class: "mono" }, id || "a request of another key")) : "nobody ends here")),
      h("h3", {}, "Text"), tree.texts && Object.keys(tree.texts).length ? h("pre", {}, path.map((i) => tree.above[i] === null ? "" : h("span", { class: i === focus ? "" : "soft" }, `${tree.texts[i] ?? "… "}${i === focus ? "…" : " … "}`))) : h("p", { class: "soft" }, state.frame.viewer.is_admin ? "Texts of small segments are not told." : "Texts are shown to the admin key."));
  }
  function choose(i) {
    focus = i;
    draw();
    describe();
  }
  function zoom(i) {
    root = i;
    focus = i;
    draw();
    describe();
    place();
  }
  function place() {
    said.textContent = !tree ? "" : `${plural(tree.size - tree.roots.length, "segment")}, ${number(tree.tokens)} tokens${root === null ? "" : "; zoomed in (Esc)"}`;
  }
  const at = (x, y) => boxes.find((box) => box.level === Math.floor(y / ROW) && box.left <= x && x <= box.left + Math.max(box.size, 1));
  tooltip(canvas, (x, y) => {
    const box = tree && at(x, y);
    if (!box) return "";
    if (box.i === null) return "many small segments; click the one above to zoom in";
    return `${number(tree.num_tokens[box.i])} tokens from ${number(tree.start[box.i])}, ${number(tree.wide[box.i])} with what follows\n${textOf(box.i) ? visible(textOf(box.i)).slice(0, 160) : ""}`;
  });
  canvas.addEventListener("click", (event) => {
    const box = tree && at(event.offsetX, event.offsetY);
    if (!box) return;
    const i = box.i ?? box.above;
    if (i === focus || box.i === null) zoom(i === root ? tree.above[i] : i); else choose(i);
  });
  canvas.addEventListener("keydown", (event) => {
    if (!tree?.size) return;
    const i = focus ?? tree.roots[0], siblings = tree.above[i] === null ? tree.roots : tree.below[tree.above[i]];
    const to = {
      ArrowDown: () => tree.below[i][0], ArrowUp: () => tree.above[i],
      ArrowRight: () => siblings[siblings.indexOf(i) + 1], ArrowLeft: () => siblings[siblings.indexOf(i) - 1],
    }[event.key];
    if (to) { const next = to(); choose(next ?? i); }
    else if (event.key === "Enter") zoom(i);
    else if (event.key === "Escape") zoom(root === null ? null : tree.above[root]);
    else return;
    event.preventDefault();
  });
  function update(frame) {
    const found = chosen(state.trees);
    pages.update();
    evicted.update();
    const evictions = state.evictions.map((one) => one.time).join();
    if (evictions !== gone.dataset.told) {
      gone.dataset.told = evictions;
      gone.replaceChildren(state.evictions.length ? h("table", {}, h("thead", {}, h("tr", {}, ["when", "tokens", "from", "began"].map((text, i) => h("th", { scope: "col", class: i === 1 || i === 2 ? "n" : null }, text)))), h("tbody", {}, state.evictions.slice(0, 30).map((one) => h("tr", {}, h("td", {}, clock(one.time)), h("td", { class: "n" }, number(one.size)), h("td", { class: "n" }, number(one.start)), h("td", { class: "mono" }, visible(one.text) || "–"))))) : h("p", { class: "empty" }, "Nothing was evicted while this page was open."));
    }
    if (!found) return;
    if (found !== told) {
      const changed = tree && tree.number !== found.number;
      if (changed && (root !== null || focus !== null)) {  // the same place in the new tree: by its path of sizes
        [root, focus] = [again(tree, found, root), again(tree, found, focus)];
      }
      tree = told = found;
      const big = Array.from({ length: tree.size }, (_, i) => i).filter((i) => tree.above[i] !== null).sort((a, b) => tree.num_tokens[b] - tree.num_tokens[a]).slice(0, 40);
      largest.replaceChildren(...big.map((i) => h("tr", {}, h("td", { class: "n" }, h("button", { type: "button", onclick: () => choose(i) }, number(tree.num_tokens[i]))), h("td", { class: "n" }, number(tree.start[i])), h("td", { class: "n" }, percent(heat(i))), h("td", { class: "n" }, number(tree.below[i].length)), h("td", {}, String(readers(i).length || "–")), h("td", { class: "mono" }, visible((tree.texts[i] ?? "").slice(0, 70)) || "–"))));
      if (!big.length) largest.append(h("tr", {}, h("td", { colspan: 6, class: "empty" }, "Nothing is cached.")));
    }
    place();
    draw();
    if (details.childElementCount === 0 || document.activeElement === canvas || focus !== null) describe();
  }
  const again = (old, fresh, i) => i === null || i >= old.size ? null : (fresh.last_page.indexOf(old.last_page[i]) >= 0 && old.last_page[i] !== null ? fresh.last_page.indexOf(old.last_page[i]) : null);
  return { element, update };
}

// -- runs -------------------------------------------------------------------------------------------------------------

const WORK = new Set(["generate", "select", "fork", "join", "toolcall", "capture"]);

// The graph of the nodes that do something: texts, roles and arguments become its edges.
function workGraph(nodes) {
  const nearest = [], shown = [];
  nodes.forEach((node, id) => {
    const sources = new Set(node.needs.filter((need) => need < id).flatMap((need) => [...(nearest[need] ?? [])]));
    if (WORK.has(node.kind)) {
      shown.push({ id, kind: node.kind, label: node.label, from: [...sources] });
      nearest[id] = new Set([id]);
    } else nearest[id] = sources;
  });
  if (!shown.length) nodes.forEach((node, id) => shown.push({ id, kind: node.kind, label: node.label, from: node.needs.filter((need) => need < id) }));
  const place = new Map(shown.map((node, i) => [node.id, i])), lanes = [];
  for (const node of shown) {
    node.from = node.from.filter((id) => place.has(id));
    node.column = Math.max(-1, ...node.from.map((id) => shown[place.get(id)].column)) + 1;
    const wanted = node.from.length ? shown[place.get(node.from[0])].lane : 0;
    const taken = lanes[node.column] ??= new Set();
    let lane = wanted;
    while (taken.has(lane)) lane++;
    taken.add(lane);
    node.lane = lane;
  }
  return { nodes: shown, place, columns: Math.max(1, ...shown.map((node) => node.column + 1)), lanes: Math.max(1, ...shown.map((node) => node.lane + 1)) };
}

const STATE_COLOUR = { d: "good", r: "run", e: "bad", c: "warn", t: "tool", ".": "line" };
const STATE_NAME = { d: "done", r: "running", e: "failed", c: "cancelled", t: "waits for a tool", ".": "not begun" };

function mini(canvas, graph, states, wide) {
  const [draw, width, height] = prepare(canvas, 56, wide);
  const x = (node) => 7 + node.column * Math.min(70, (width - 14) / Math.max(graph.columns - 1, 1));
  const y = (node) => graph.lanes === 1 ? height / 2 : 6 + node.lane * (height - 12) / (graph.lanes - 1);
  draw.strokeStyle = colour("line");
  draw.beginPath();
  for (const node of graph.nodes) for (const id of node.from) {
    const from = graph.nodes[graph.place.get(id)];
    draw.moveTo(x(from), y(from));
    draw.lineTo(x(node), y(node));
  }
  draw.stroke();
  const size = Math.max(1.6, Math.min(4.5, (height - 8) / graph.lanes / 2));
  for (const node of graph.nodes) {
    draw.fillStyle = colour(STATE_COLOUR[states[node.id]] ?? "line");
    draw.beginPath();
    draw.arc(x(node), y(node), size, 0, 7);
    draw.fill();
  }
}

async function cancel(id, button) {
  button.disabled = true;
  try {
    await ask("/ui/cancel", { json: { rid: id } });
    button.textContent = "cancelled";
  } catch (error) {
    button.textContent = error.message;
  }
}

function runs() {
  const cards = h("div", { class: "cards" }), rows = h("tbody", {}), said = h("span", { class: "soft" }), requestsSaid = h("span", { class: "soft" });
  const table = h("table", {}, h("thead", {}, h("tr", {}, ["request", "key", "since", "prompt waits", "tokens", ""].map((text, i) => h("th", { scope: "col", class: i > 1 && i < 5 ? "n" : null }, text)))), rows);
  const none = h("p", { class: "empty" });
  const element = h("div", {}, h("h1", {}, "Programs ", said), none, cards,
    h("section", { class: "panel later" }, h("h2", {}, "Requests ", requestsSaid), h("div", { class: "scroll" }, table)));
  const known = new Map(), lines = new Map();
  function card(program) {
    const canvas = h("canvas", { role: "img" }), pill = h("span", { class: "pill" }), left = h("span", {}), right = h("span", {});
    const stop = h("button", { type: "button", class: "danger", onclick: () => cancel(program.id, stop) }, "Cancel");
    const name = h("a", { class: "mono", href: `#/run/${encodeURIComponent(program.id)}` }, program.id.split("-").at(-1).slice(0, 12));
    const link = h("div", { class: "card" }, h("header", {}, name, pill, stop), canvas, h("footer", {}, left, right));
    return { link, canvas, pill, left, right, stop, drawn: "" };
  }
  function update(frame) {
    const alive = new Set(), wide = cards.firstElementChild?.querySelector("canvas").clientWidth ?? 0;
    frame.programs.forEach((program, i) => {
      alive.add(program.id);
      let one = known.get(program.id);
      if (!one) known.set(program.id, one = card(program));
      if (cards.children[i] !== one.link) cards.insertBefore(one.link, cards.children[i] ?? null);
      const isRunning = program.status === "running", graph = state.shapes.get(program.id);
      if (one.pill.textContent !== program.status) {
        one.pill.textContent = program.status;
        one.pill.className = `pill ${program.status}`;
      }
      one.stop.hidden = !isRunning;
      const work = graph ? graph.nodes.length : 0, done = graph ? graph.nodes.filter((node) => "de".includes(program.states[node.id])).length : 0;
      const many = Object.values(program.rows).reduce((a, b) => a + b, 0);
      one.left.textContent = `${done} of ${work} nodes${many > 1 ? `, ${many - (program.rows.running ?? 0)} of ${many} rows` : ""}`;
      one.right.textContent = `${program.owner ? `${program.owner}, ` : ""}${seconds((program.ended_s ?? frame.time_s) - program.started_s)}`;
      const key = `${program.states}${graph?.nodes.length} ${wide}${document.documentElement.dataset.theme}`;
      if (graph && key !== one.drawn) {
        one.drawn = key;
        mini(one.canvas, graph, program.states, wide);
        one.canvas.setAttribute("aria-label", `${done} of ${work} nodes are over`);
      }
    });
    for (const [id, one] of known) if (!alive.has(id)) { one.link.remove(); known.delete(id); }
    said.textContent = `${number(frame.num_programs)} running${frame.programs.length ? `, ${number(frame.programs.length)} shown` : ""}`;
    none.hidden = frame.programs.length > 0;
    none.textContent = frame.viewer.is_admin ? "No program has run yet. The playground can start one." : "No program of yours has run yet.";
    const here = new Set();
    frame.requests.forEach(([id, key, age, waiting, made]) => {
      here.add(id);
      let line = lines.get(id);
      if (!line) {
        const cells = ["mono", "", "n", "n", "n"].map((kind) => h("td", { class: kind }));
        const stop = h("button", { type: "button", class: "danger", onclick: () => cancel(id, stop) }, "Cancel");
        lines.set(id, line = { row: h("tr", {}, cells, h("td", {}, stop)), cells });
        rows.append(line.row);
      }
      [id, key || "–", seconds(age), waiting ? number(waiting) : "–", number(made)].forEach((text, i) => { line.cells[i].textContent = text; });
    });
    for (const [id, line] of lines) if (!here.has(id)) { line.row.remove(); lines.delete(id); }
    table.hidden = !here.size;
    requestsSaid.textContent = `${number(frame.num_requests)} in flight${here.size < frame.num_requests ? `, ${number(here.size)} shown` : ""}`;
  }
  return { element, update };
}

function run(id, row) {
  const title = h("h1", {}), graphBox = h("div", { class: "scroll" }), details = h("div", { "aria-live": "polite" }), list = h("tbody", {}), bars = h("div", { class: "scroll" });
  const stop = h("button", { type: "button", class: "danger", onclick: () => cancel(id, stop) }, "Cancel");
  const rowChoice = h("select", { "aria-label": "row", onchange: () => { location.hash = `#/run/${encodeURIComponent(id)}/${rowChoice.value}`; } });
  const wrong = h("p", { class: "badtext", role: "alert" });
  const element = h("div", {}, h("p", {}, h("a", { href: "#/runs" }, "← all runs")), h("div", { class: "row" }, title, stop, rowChoice), wrong,
    h("div", { class: "split" }, h("section", { class: "panel" }, h("h2", {}, "Graph"), graphBox), h("section", { class: "panel" }, h("h2", {}, "Node"), details)),
    h("section", { class: "panel later" }, h("h2", {}, "When the nodes ran"), bars),
    h("section", { class: "panel" }, h("h2", {}, "Nodes"), h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, ["node", "state", "from the cache", "prompt", "made", "text"].map((text, i) => h("th", { scope: "col", class: i > 1 && i < 5 ? "n" : null }, text)))), list))));
  let shown = null, chosenNode = null, groups = new Map(), graph = null, drawn = -1;
  function describe() {
    const node = shown?.nodes[chosenNode];
    if (!node) { put(details, h("p", { class: "empty" }, "Choose a node of the graph.")); return; }
    const usage = node.usage, times = node.timings;
    put(details, h("dl", {}, h("dt", {}, "node"), h("dd", {}, `${node.kind} ${node.label ?? ""} (${chosenNode})`), h("dt", {}, "state"), h("dd", {}, STATE_NAME[shown.states[chosenNode]]),
      node.line ? [h("dt", {}, "line"), h("dd", { class: "mono" }, node.line)] : null,
      usage ? [h("dt", {}, "tokens"), h("dd", {}, `${number(usage.prompt_tokens ?? 0)} of prompt, ${number(usage.cached_tokens ?? 0)} of them cached; ${number(usage.completion_tokens ?? 0)} made`)] : null,
      times ? [h("dt", {}, "time"), h("dd", {}, `${seconds(times.start_s)} to ${seconds(times.end_s)}${times.first_token_s !== undefined ? `, first token ${seconds(times.first_token_s)}` : ""}`)] : null,
      node.finish_reason ? [h("dt", {}, "ended by"), h("dd", {}, node.finish_reason)] : null),
      node.error ? h("p", { class: "badtext" }, node.error) : null, node.text ? [h("h3", {}, "Text"), h("pre", {}, node.text)] : null);
  }
  function choose(node) {
    groups.get(chosenNode)?.classList.remove("chosen");
    chosenNode = node;
    groups.get(node)?.classList.add("chosen");
    describe();
  }
  function drawGraph() {
    graph = workGraph(shown.nodes);
    const W = 148, H = 38, X = 190, Y = 50;
    const svg = s("svg", { class: "graph", width: (graph.columns - 1) * X + W + 8, height: (graph.lanes - 1) * Y + H + 8, role: "group", "aria-label": "The program's graph" });
    for (const node of graph.nodes) for (const from of node.from) {
      const a = graph.nodes[graph.place.get(from)], x1 = a.column * X + W + 4, y1 = a.lane * Y + H / 2 + 4, x2 = node.column * X + 4, y2 = node.lane * Y + H / 2 + 4;
      svg.append(s("path", { d: `M${x1} ${y1}C${x1 + 24} ${y1} ${x2 - 24} ${y2} ${x2} ${y2}` }));
    }
    groups = new Map();
    for (const node of graph.nodes) {
      const label = node.label ?? node.kind;
      const group = s("g", { tabindex: 0, role: "button", transform: `translate(${node.column * X + 4},${node.lane * Y + 4})`, onclick: () => choose(node.id), onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(node.id); } } },
        s("rect", { width: W, height: H }), s("text", { x: 10, y: 16 }, label.length > 19 ? `${label.slice(0, 18)}…` : label), s("text", { x: 10, y: 30, class: "sub" }, node.kind));
      groups.set(node.id, group);
      svg.append(group);
    }
    graphBox.replaceChildren(svg);
    drawn = shown.nodes.length;
  }
  function drawTimes() {
    const timed = shown.nodes.map((node, i) => ({ ...node, i })).filter((node) => node.timings && WORK.has(node.kind) && node.kind !== "fork" && node.kind !== "join").slice(0, 200);
    if (!timed.length) { bars.replaceChildren(h("p", { class: "empty" }, "No node has ended yet.")); return; }
    const end = Math.max(...timed.map((node) => node.timings.end_s), 1e-6), W = 900, R = 18;
    const svg = s("svg", { viewBox: `0 0 ${W} ${timed.length * R + 16}`, width: "100%", role: "img", "aria-label": `Times of ${timed.length} nodes within ${seconds(end)}` });
    timed.forEach((node, i) => {
      const at = (time) => 150 + (time ?? 0) / end * (W - 230), start = at(node.timings.start_s), first = at(node.timings.first_token_s ?? node.timings.start_s), stopAt = at(node.timings.end_s);
      svg.append(s("text", { x: 144, y: i * R + 12, "text-anchor": "end", fill: colour("text"), "font-size": 11 }, (node.label ?? node.kind).slice(0, 22)),
        s("rect", { x: start, y: i * R + 4, width: Math.max(first - start, 0.8), height: 9, fill: colour("prompt") }), s("rect", { x: first, y: i * R + 4, width: Math.max(stopAt - first, 0.8), height: 9, fill: colour("decode") }),
        s("text", { x: stopAt + 5, y: i * R + 12, fill: colour("soft"), "font-size": 10 }, seconds((node.timings.end_s ?? 0) - (node.timings.start_s ?? 0))));
    });
    bars.replaceChildren(svg);
  }
  function update(frame) {
    if (state.run === undefined) return;
    stop.hidden = state.run?.status !== "running";
    if (state.run === null) {
      title.textContent = "Not here";
      wrong.textContent = "No run with this id is kept, or it belongs to another key. The last 256 programs are kept.";
      return;
    }
    if (state.run === shown) return;
    shown = state.run;
    title.replaceChildren("Run ", h("span", { class: "mono" }, shown.id), " ", h("span", { class: `pill ${shown.status}` }, shown.status));
    wrong.textContent = shown.error ? `${shown.error_type}: ${shown.error}` : "";
    rowChoice.hidden = shown.rows.length < 2;
    if (rowChoice.options.length !== shown.rows.length) rowChoice.replaceChildren(...[...shown.rows].map((_, i) => h("option", { value: i }, `row ${i}`)));
    rowChoice.value = String(shown.row);
    if (drawn !== shown.nodes.length) drawGraph();
    for (const [node, group] of groups) {
      group.setAttribute("class", `s-${shown.states[node] === "." ? "n" : shown.states[node]}${node === chosenNode ? " chosen" : ""}`);
      group.setAttribute("aria-label", `${shown.nodes[node].label ?? shown.nodes[node].kind}: ${STATE_NAME[shown.states[node]]}`);
    }
    if (chosenNode === null) {
      const failed = graph.nodes.find((node) => shown.states[node.id] === "e");
      if (failed) choose(failed.id); else describe();
    } else describe();
    drawTimes();
    list.replaceChildren(...graph.nodes.map((work) => {
      const node = shown.nodes[work.id], usage = node.usage;
      return h("tr", {}, h("td", {}, h("button", { type: "button", onclick: () => choose(work.id) }, node.label ?? node.kind)), h("td", {}, STATE_NAME[shown.states[work.id]]), h("td", { class: "n" }, usage?.prompt_tokens ? percent((usage.cached_tokens ?? 0) / usage.prompt_tokens) : "–"), h("td", { class: "n" }, usage ? number(usage.prompt_tokens ?? 0) : "–"), h("td", { class: "n" }, usage ? number(usage.completion_tokens ?? 0) : "–"), h("td", {}, node.error ? h("span", { class: "badtext" }, node.error) : visible(node.text).slice(0, 160)));
    }));
    if (shown.num_nodes > shown.nodes.length) list.append(h("tr", {}, h("td", { colspan: 6, class: "soft" }, `and ${number(shown.num_nodes - shown.nodes.length)} nodes more`)));
  }
  return { element, update, run: id, row };
}

// -- playground -------------------------------------------------------------------------------------------------------

const PLACES = { chat: "Chat", schema: "Schema", tools: "Tool calls", program: "Program" };
const EXAMPLES = {
  schema: JSON.stringify({ type: "object", properties: { name: { type: "string" }, age: { type: "integer", minimum: 0, maximum: 120 } }, required: ["name", "age"] }, null, 2),
  tools: JSON.stringify([{ type: "function", function: { name: "weather", description: "The weather in a city", parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] } } }], null, 2),
  program: "Write one sentence about {{topic}}.\n{gen sentence max_tokens=24}\nIs it {select mood cheerful|sad}?\n",
};
const kept = { chat: [], text: {} };

// The place of a JSON pointer in a JSON text: the index of its key or value, or null.
function placeOf(text, pointer) {
  const wanted = pointer.replace(/^#/, "").split("/").slice(1).map((part) => decodeURIComponent(part).replaceAll("~1", "/").replaceAll("~0", "~"));
  let at = 0;
  const blank = () => { while (/\s/.test(text[at] ?? "")) at++; };
  const string = () => { const from = at++; while (at < text.length && text[at] !== '"') at += text[at] === "\\" ? 2 : 1; return text.slice(from, ++at); };
  function value(path) {  // walks over one value; returns its index, or that of its key, if it is the wanted one
    blank();
    const here = at;
    if (path.length === wanted.length && path.every((part, i) => part === wanted[i])) return here;
    if (text[at] === "{" || text[at] === "[") {
      const isObject = text[at++] === "{";
      for (let index = 0; at < text.length; index++) {
        blank();
        if (text[at] === "}" || text[at] === "]") { at++; return null; }
        const keyAt = at;
        let name = String(index);
        if (isObject) {
          try { name = JSON.parse(string()); } catch { return null; }
          blank();
          at++;
        }
        const found = value([...path, name]);
        if (found !== null) return path.length + 1 === wanted.length && isObject ? keyAt : found;
        blank();
        if (text[at] === ",") at++;
      }
    } else if (text[at] === '"') string();
    else while (at < text.length && !/[\s,}\]]/.test(text[at])) at++;
    return null;
  }
  return value([]);
}

function diagnosis(text, index, message) {
  const start = text.lastIndexOf("\n", index - 1) + 1, end = text.indexOf("\n", index) < 0 ? text.length : text.indexOf("\n", index);
  const line = text.slice(0, index).split("\n").length;
  return h("div", { class: "msg error", role: "alert" }, h("small", {}, `line ${line}, column ${index - start + 1}`),
    h("pre", { class: "caret" }, `${text.slice(start, end)}\n${" ".repeat(index - start)}^`), h("div", {}, message));
}

function parsed(text) {  // JSON, or an error with its place
  try {
    return { value: JSON.parse(text) };
  } catch (error) {
    const at = /position (\d+)/.exec(error.message), line = /line (\d+) column (\d+)/.exec(error.message);
    let index = text.length;
    if (at) index = Number(at[1]);
    else if (line) index = text.split("\n").slice(0, line[1] - 1).reduce((sum, one) => sum + one.length + 1, 0) + Number(line[2]) - 1;
    return { problem: diagnosis(text, index, error.message) };
  }
}

function templateGraph(text, given) {  // the small language of the playground -> a graph, or an error with its place
  const nodes = [], args = new Map(), add = (node) => { nodes.push({ id: nodes.length, ...node }); return nodes.length - 1; };
  const pieces = [...text.matchAll(/\{\{(\w+)\}\}|\{(gen|select) ([^{}]*)\}/g)];
  for (const piece of pieces) if (piece[1] && !args.has(piece[1])) {
    if (!(piece[1] in given)) return { problem: diagnosis(text, piece.index, `${piece[1]} has no value: give it in the field below, as ${piece[1]}=...`) };
    args.set(piece[1], add({ kind: "argument", name: piece[1] }));
  }
  let parent = null, words = [], end = 0;
  const flush = () => { if (words.length) parent = add({ kind: "text", ...(parent === null ? {} : { parent }), parts: words }); words = []; };
  const names = new Set();
  for (const piece of [...pieces, null]) {
    const literal = text.slice(end, piece?.index ?? text.length);
    const stray = literal.search(/\{(gen|select)\b/);
    if (stray >= 0) return { problem: diagnosis(text, end + stray, "this is not closed: write {gen NAME max_tokens=N} or {select NAME one|other}") };
    if (literal) words.push(literal);
    if (!piece) break;
    end = piece.index + piece[0].length;
    if (piece[1]) { words.push({ node: args.get(piece[1]) }); continue; }
    const [name, ...rest] = piece[3].trim().split(/\s+/);
    if (!/^\w+$/.test(name) || names.has(name)) return { problem: diagnosis(text, piece.index, names.has(name) ? `there are two nodes called ${name}` : "a name is missing: {gen NAME} or {select NAME one|other}") };
    names.add(name);
    flush();
    if (piece[2] === "gen") {
      const sampling = { max_tokens: 64 };
      for (const word of rest) {
        const option = /^(max_tokens|temperature|top_p|top_k|seed)=([\d.]+)$/.exec(word);
        if (!option) return { problem: diagnosis(text, piece.index + piece[0].indexOf(word), `${word} is none of max_tokens, temperature, top_p, top_k, seed with a number`) };
        sampling[option[1]] = Number(option[2]);
      }
      parent = add({ kind: "generate", ...(parent === null ? {} : { parent }), name, sampling });
    } else {
      const choices = rest.join(" ").split("|").filter((choice) => choice);
      if (choices.length < 2) return { problem: diagnosis(text, piece.index, "give at least two choices with | between them") };
      parent = add({ kind: "select", ...(parent === null ? {} : { parent }), name, choices: choices.map((choice) => [choice]) });
    }
  }
  flush();
  return { graph: { version: 2, nodes } };
}

function playground(place) {
  if (!PLACES[place]) place = "chat";
  const talk = h("div", { class: "talk", "aria-live": "polite" }), input = h("input", { class: "wide", type: "text", "aria-label": "Message", value: kept.text[`${place}-input`] ?? { chat: "", schema: "Describe a person.", tools: "What is the weather in Paris?", program: "topic=rain" }[place], placeholder: place === "program" ? "topic=rain" : "Message" });
  const tokens = h("input", { type: "number", min: 1, value: 128 }), warmth = h("input", { type: "number", min: 0, max: 2, step: 0.1, value: place === "chat" ? 0.7 : 0 });
  const source = place === "chat" ? null : h("textarea", { rows: 11, spellcheck: "false", "aria-label": { schema: "JSON schema", tools: "Tools", program: "Program" }[place], value: kept.text[place] ?? EXAMPLES[place] });
  const send = h("button", { class: "primary", type: "submit" }, place === "program" ? "Run" : "Send"), halt = h("button", { type: "button", disabled: true }, "Stop"), clear = h("button", { type: "button" }, "Clear");
  let going = null;
  const form = h("form", { class: "form", onsubmit: (event) => { event.preventDefault(); if (!going) work(); } }, input, place === "program" ? null : [h("label", {}, "at most ", tokens, " tokens"), h("label", {}, "temperature ", warmth)], send, halt, clear);
  const about = { chat: "", schema: "The answer cannot leave this schema. A schema that cannot be enforced is refused, and the place is shown.", tools: "Calls are valid by construction: their arguments follow the parameters.", program: "{{name}} is an argument, {gen NAME max_tokens=N} generates, {select NAME one|other} chooses. The whole program runs inside the engine." }[place];
  const element = h("div", {}, h("h1", {}, "Playground"), h("nav", { "aria-label": "Kinds" }, Object.entries(PLACES).map(([id, name]) => h("a", { href: `#/play/${id}`, "aria-current": id === place ? "page" : null }, name))),
    h("section", { class: "panel" }, about ? h("p", { class: "soft" }, about) : null, source, form, talk));
  halt.addEventListener("click", () => going?.abort());
  clear.addEventListener("click", () => { talk.replaceChildren(); kept.chat = []; });
  function say(kind, title, text = "") {
    const body = h("pre", {}, text);
    talk.append(h("div", { class: `msg ${kind}` }, h("small", {}, title), body));
    talk.scrollTop = talk.scrollHeight;
    return body;
  }
  const more = (body, text) => { body.textContent += text; talk.scrollTop = talk.scrollHeight; };
  if (place === "chat") for (const one of kept.chat) say(one.role, one.role, one.content);
  async function work() {
    if (source) kept.text[place] = source.value;
    kept.text[`${place}-input`] = place === "chat" ? "" : input.value;
    going = new AbortController();
    send.disabled = true;
    halt.disabled = false;
    try {
      await (place === "program" ? program() : chat());
    } catch (error) {
      if (error.name === "AbortError") say("error", "stopped");
      else if (place === "schema" && source) talk.append(schemaProblem(source.value, error.message));
      else say("error", "error", error.status === 401 ? `${error.message}. The admin key alone may not generate; use a key of a user.` : error.message);
      talk.scrollTop = talk.scrollHeight;
    }
    going = null;
    send.disabled = false;
    halt.disabled = true;
  }
  function schemaProblem(text, message) {
    for (const [pointer] of message.matchAll(/#?(?:\/[^\s:;,'"()]+)+/g)) {
      const index = placeOf(text, pointer);
      if (index !== null) return diagnosis(text, index, message);
    }
    return h("div", { class: "msg error", role: "alert" }, h("pre", {}, message));
  }
  async function chat() {
    const body = { stream: true, stream_options: { include_usage: true }, max_tokens: Number(tokens.value) || 128, temperature: Number(warmth.value) };
    if (source) {
      const read = parsed(source.value);
      if (read.problem) { talk.append(read.problem); return; }
      if (place === "schema") body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: read.value } };
      else body.tools = read.value;
    }
    if (!input.value) return;
    const mine = { role: "user", content: input.value };
    body.messages = place === "chat" ? [...kept.chat, mine] : [mine];
    body.model = "default";
    say("user", "user", mine.content);
    if (place === "chat") input.value = "";
    const response = await ask("/v1/chat/completions", { json: body, signal: going.signal });
    const answer = say("assistant", "assistant"), calls = new Map();
    let thoughts = null, usage = null, ended = "";
    for await (const [, data] of eventsOf(response)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refused(chunk.error.message);
      usage = chunk.usage ?? usage;
      const choice = chunk.choices?.[0], delta = choice?.delta ?? {};
      ended = choice?.finish_reason ?? ended;
      if (delta.reasoning_content) more(thoughts ??= say("tool", "thinks"), delta.reasoning_content);
      if (delta.content) more(answer, delta.content);
      for (const call of delta.tool_calls ?? []) {
        if (!calls.has(call.index)) calls.set(call.index, say("tool", `calls ${call.function?.name ?? ""}`));
        more(calls.get(call.index), call.function?.arguments ?? "");
      }
    }
    if (place === "chat") kept.chat.push(mine, { role: "assistant", content: answer.textContent });
    if (!answer.textContent) answer.parentElement.hidden = calls.size > 0;
    if (usage) talk.append(h("small", { class: "soft" }, `${number(usage.prompt_tokens)} tokens of prompt, ${number(usage.prompt_tokens_details?.cached_tokens ?? 0)} of them cached, ${number(usage.completion_tokens)} made; ended by ${ended}`));
  }
  async function program() {
    const given = Object.fromEntries(input.value.split(/[,;]\s*/).filter((one) => one.includes("=")).map((one) => [one.slice(0, one.indexOf("=")).trim(), one.slice(one.indexOf("=") + 1)]));
    const made = templateGraph(source.value, given);
    if (made.problem) { talk.append(made.problem); return; }
    const names = new Set(made.graph.nodes.filter((node) => node.kind === "argument").map((node) => node.name));
    const args = Object.fromEntries(Object.entries(given).filter(([name]) => names.has(name)));
    const response = await ask("/v1/programs", { json: { graph: made.graph, arguments: args, stream: true }, signal: going.signal });
    const bodies = new Map();
    for await (const [name, data] of eventsOf(response)) {
      const event = JSON.parse(data);
      if (name === "program") talk.append(h("p", {}, h("a", { href: `#/run/${encodeURIComponent(event.id)}` }, `run ${event.id}`)));
      else if (name === "node") {
        const node = made.graph.nodes[event.node];
        if (!node || !WORK.has(node.kind)) continue;
        if (!bodies.has(event.node)) bodies.set(event.node, say("assistant", node.name));
        if (event.kind === "text") more(bodies.get(event.node), event.text);
        else if (event.kind === "done" && !bodies.get(event.node).textContent) more(bodies.get(event.node), event.text || String(event.value ?? ""));
        else if (event.kind === "error") say("error", node.name, event.error.message);
      } else if (name === "end") say(event.status === "done" ? "tool" : "error", event.status, event.rows[0].error ?? "");
    }
  }
  return { element, update: null };
}

// -- API --------------------------------------------------------------------------------------------------------------

function api() {
  const list = h("div", {}, h("p", { class: "soft" }, "Reading the document…")), search = h("input", { class: "wide", type: "search", placeholder: "filter: a path, a word", "aria-label": "Filter endpoints" });
  const element = h("div", {}, h("h1", {}, "API"), h("p", { class: "soft" }, "Made from ", h("a", { href: "/openapi.json" }, "/openapi.json"), ". A field that is not declared is refused by its name."), h("div", { class: "form" }, search), list);
  let document_ = null;
  const resolved = (schema) => {
    let found = schema ?? {};
    for (let i = 0; found.$ref && i < 9; i++) found = found.$ref.split("/").slice(1).reduce((place, part) => place?.[part], document_) ?? {};
    return found;
  };
  function kind(schema) {
    const found = resolved(schema);
    if (found.const !== undefined) return JSON.stringify(found.const);
    if (found.enum) return found.enum.map((one) => JSON.stringify(one)).join(" | ").slice(0, 160);
    const some = found.anyOf ?? found.oneOf;
    if (some) return [...new Set(some.map(kind))].join(" | ").slice(0, 160);
    if (found.type === "array") return `list of ${kind(found.items)}`;
    return Array.isArray(found.type) ? found.type.join(" | ") : found.type ?? (found.properties ? "object" : "any");
  }
  const RANGES = { minimum: "≥", exclusiveMinimum: ">", maximum: "≤", exclusiveMaximum: "<", minLength: "length ≥", maxLength: "length ≤", minItems: "items ≥", maxItems: "items ≤" };
  function rangesOf(schema) {
    const found = resolved(schema), all = [found, ...(found.anyOf ?? []).map(resolved)];
    return [...new Set(all.flatMap((one) => Object.entries(RANGES).filter(([name]) => one[name] !== undefined).map(([name, sign]) => `${sign} ${one[name]}`)))].join(", ");
  }
  function fields(schema, depth = 0) {
    const found = resolved(schema);
    const own = found.properties ?? {};
    const parts_ = (found.allOf ?? []).map(resolved).filter((one) => one.properties);
    const properties = Object.assign({}, ...parts_.map((one) => one.properties), own);
    if (!Object.keys(properties).length) return h("p", { class: "soft" }, kind(found));
    return h("table", {}, h("thead", {}, h("tr", {}, ["field", "type", "default", ""].map((text) => h("th", { scope: "col" }, text)))), h("tbody", {}, Object.entries(properties).map(([name, one]) => {
      const inner = resolved(one), nested = depth < 2 && [inner, ...(inner.anyOf ?? []).map(resolved), resolved(inner.items)].find((each) => each.properties);
      return h("tr", {}, h("td", {}, h("code", {}, name), (found.required ?? []).includes(name) ? h("span", { class: "badtext", title: "required" }, " *") : null), h("td", {}, kind(one), rangesOf(one) ? h("div", { class: "soft" }, rangesOf(one)) : null), h("td", { class: "mono" }, one.default === undefined ? "" : JSON.stringify(one.default)), h("td", {}, one.description ?? "", nested ? lazily("fields", () => fields(nested, depth + 1)) : null));
    })));
  }
  function lazily(title, make) {
    const box = h("details", {}, h("summary", {}, title));
    box.addEventListener("toggle", () => { if (box.open && box.childElementCount === 1) box.append(make()); });
    return box;
  }
  function attempt(path, method, body) {
    const where = h("input", { class: "wide", type: "text", value: path, "aria-label": "Path" }), what = body ? h("textarea", { rows: 6, spellcheck: "false", "aria-label": "Body", value: body }) : null, out = h("pre", {});
    const go = h("button", { class: "primary", type: "button", onclick: async () => {
      out.textContent = "…";
      try {
        const headers = state.key ? { Authorization: `Bearer ${state.key}` } : {};
        if (what) headers["Content-Type"] = "application/json";
        const response = await fetch(where.value, { method: method.toUpperCase(), headers, body: what ? what.value : undefined });
        out.textContent = `${response.status} ${response.statusText}\n${(await response.text()).slice(0, 20000)}`;
      } catch (error) { out.textContent = String(error.message); }
    } }, "Send");
    return h("div", {}, h("div", { class: "form" }, where, go), what, out);
  }
  const SAMPLES = { "/v1/chat/completions": { model: "default", messages: [{ role: "user", content: "Hello" }], max_tokens: 32 }, "/v1/completions": { model: "default", prompt: "Once upon a time", max_tokens: 32 }, "/generate": { text: "Once upon a time", sampling_params: { max_new_tokens: 16 } }, "/v1/responses": { model: "default", input: "Hello", max_output_tokens: 32 }, "/v1/messages": { model: "default", max_tokens: 32, messages: [{ role: "user", content: "Hello" }] } };
  function endpoint(path, method, operation) {
    const box = h("details", { class: "endpoint panel", "data-find": `${path} ${operation.summary}`.toLowerCase() }, h("summary", {}, h("span", { class: `method ${method}` }, method.toUpperCase()), " ", h("code", {}, path), " ", h("span", { class: "soft" }, operation.summary.split("\n")[0])));
    box.addEventListener("toggle", () => {
      if (!box.open || box.childElementCount > 1) return;
      const schema = operation.requestBody?.content["application/json"].schema;
      fill(box, {}, [h("p", { class: "about" }, operation.summary), schema ? [h("h3", {}, "Body"), fields(schema)] : null, h("h3", {}, "Answers"),
        h("table", {}, h("tbody", {}, Object.entries(operation.responses).map(([status, one]) => h("tr", {}, h("td", { class: "mono" }, status), h("td", {}, one.description, Object.entries(one.content ?? {}).map(([type, each]) => status < 300 && each.schema ? lazily(type, () => fields(each.schema)) : null)))))),
        h("h3", {}, "Try it"), attempt(path, method, schema ? JSON.stringify(SAMPLES[path] ?? {}, null, 2) : null)]);
    });
    return box;
  }
  (async () => {
    try {
      document_ = await (await ask("/openapi.json")).json();
      const byTag = new Map();
      for (const [path, methods] of Object.entries(document_.paths)) for (const [method, operation] of Object.entries(methods)) {
        const tag = operation.tags?.[0] ?? "server";
        byTag.set(tag, [...(byTag.get(tag) ?? []), endpoint(path, method, operation)]);
      }
      list.replaceChildren(...[...byTag].map(([tag, some]) => h("section", {}, h("h2", {}, tag), some)));
    } catch (error) { list.replaceChildren(h("p", { class: "badtext" }, error.message)); }
  })();
  search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/).filter((word) => word);
    for (const box of list.querySelectorAll(".endpoint")) box.hidden = !words.every((word) => box.dataset.find.includes(word));
  });
  return { element, update: null };
}

// -- places -----------------------------------------------------------------------------------------------------------

function show() {
  const [, first = "", second = "", third = "0"] = (isDocs ? "#/api" : location.hash || "#/").slice(1).split("/");
  const before = state.view, id = decodeURIComponent(second);
  const make = { "": overview, cache, runs, run: () => run(id, Number(third) || 0), play: () => playground(second), api }[first] ?? overview;
  state.view = make();
  state.run = undefined;
  document.querySelectorAll(".tip").forEach((tip) => tip.remove());
  $("main").replaceChildren(probe, state.view.element);
  for (const link of $("nav").children) {
    const place = link.getAttribute("href").slice(2), here = place === first || (place === "runs" && first === "run");
    if (here) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
  document.title = `Ramet: ${isDocs ? "API" : first || "overview"}`;
  if (state.frame) state.view.update?.(state.frame);
  if (before && (before.run !== state.view.run || before.row !== state.view.row)) reconnect();
}

function reconnect() {
  stream?.abort();
  stream = null;
  follow();
}

function start() {
  $("nav").replaceChildren(...(isDocs ? [] : VIEWS.map(([place, name], i) => h("a", { href: `#${place}`, "aria-keyshortcuts": String(i + 1) }, name))));
  if (isDocs) document.querySelector(".brand").setAttribute("href", "/ui");
  themed(stored("theme") || "auto");
  $("theme").addEventListener("click", nextTheme);
  $("key-button").addEventListener("click", askKey);
  $("engine").addEventListener("change", () => { state.engine = $("engine").value; state.view?.update?.(state.frame); });
  $("key-dialog").addEventListener("close", () => {
    if ($("key-dialog").returnValue !== "ok") return;
    state.key = $("key").value.trim();
    stored("key", state.key);
    $("key").value = "";
    state.history = [];
    if (!isDocs) reconnect();
  });
  addEventListener("hashchange", () => { show(); $("main").focus({ preventScroll: true }); scrollTo(0, 0); });
  addEventListener("resize", () => { if (state.frame) state.view?.update?.(state.frame); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { colours = {}; });
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select, dialog")) return;
    const place = VIEWS[Number(event.key) - 1];
    if (place && !isDocs) location.hash = `#${place[0]}`;
    else if (event.key === "t") nextTheme();
    else if (event.key === "k") askKey();
    else if (event.key === "?") $("help").showModal();
    else return;
    event.preventDefault();
  });
  show();
  showStatus();
  if (!isDocs) follow();
}
start();
