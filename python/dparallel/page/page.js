// The page of `dparallel serve`, and of a recording. Everything that a model or a person has written gets into
// the page as text (textContent, dataset), never as markup.

const DATA = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const MOST_PANES = 4;
const LAST_COLOUR = 64; // passes from this one on look alike
const SCALE = [1, 2, 4, 8, 16, 32, 64];

function make(name, { text, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  if (text !== undefined) element.textContent = text;
  element.append(...children);
  return element;
}

// Twice as late is one step further on the scale, however many passes there are in the end.
function colour(element, pass) {
  element.style.setProperty("--at", Math.min(1, Math.log2(Math.max(1, pass)) / Math.log2(LAST_COLOUR)).toFixed(3));
}

const count = (number, what) => `${number} ${what}${number === 1 ? "" : what.endsWith("s") ? "es" : "s"}`;
const short = (number) => (number >= 100 ? Math.round(number).toString() : number.toFixed(1));

// --- a decode -------------------------------------------------------------------------------------------

// What is known of one answer. Pass 0 is what was given: tokens between masks that are filled.
// An event is a "draft" of the server's stream: what a pass has made of the block
// from `start` on. `passes` and `logprobs` say of each token when it was decided, where they are there; so
// nothing is lost where the server has left drafts out for a slow client.
class Track {
  constructor({ kind, events = [], kept = null, seconds = null, passes = 0, length = 0 }) {
    this.causal = kind === "autoregressive";
    this.places = []; // of each place of the response the tokens that stood there, in order: {pass, text, ...}
    this.blocks = []; // [pass, end]: up to where masks were open then
    this.guesses = new Map(); // by pass: {drafted, accepted, refused}
    this.passes = 0;
    this.length = length;
    this.last = 0; // seconds until the last event
    for (const event of events) this.add(event);
    this.passes = Math.max(this.passes, passes);
    Object.assign(this, { kept, seconds });
  }

  add(event, seconds = null) {
    const { pass, start, tokens, drafted = 0, accepted = 0, refused = [] } = event;
    this.passes = Math.max(this.passes, pass);
    this.length = Math.max(this.length, event.length ?? 0, start + tokens.length);
    if (seconds !== null) this.last = seconds;
    if (drafted) this.guesses.set(pass, { drafted, accepted, refused });
    if (!this.causal) this.blocks.push([pass, start + tokens.length]);
    tokens.forEach((text, i) => {
      if (text === null) return;
      const place = (this.places[start + i] ??= []);
      const before = place.at(-1);
      if (before?.text === text) return;
      const decided = event.passes?.[i] || pass;
      const logprob = event.logprobs?.[i] ?? null;
      place.push({ pass: decided, text, logprob, guessed: i < accepted, edited: before !== undefined });
    });
  }

  // What stands at a place after so many passes; null: a mask, or nothing yet.
  token(place, pass) {
    return this.places[place]?.findLast((token) => token.pass <= pass) ?? null;
  }

  final(place) {
    return this.places[place]?.at(-1) ?? null;
  }

  behindEnd(place) {
    return this.kept !== null && place >= this.kept;
  }

  // Figures after so many passes.
  after(pass) {
    const passes = Math.min(pass, this.passes);
    let tokens = 0;
    for (let place = 0; place < (this.kept ?? this.places.length); place++) tokens += this.token(place, pass)?.pass > 0;
    let drafted = 0;
    let accepted = 0;
    for (const [own, guess] of this.guesses) {
      if (own > pass) continue;
      drafted += guess.drafted;
      accepted += guess.accepted;
    }
    return { passes, tokens, drafted, accepted };
  }
}

// --- an answer on the page ------------------------------------------------------------------------------

let panesMade = 0;

class Pane {
  constructor() {
    this.element = at("pane").content.firstElementChild.cloneNode(true);
    const find = (name) => this.element.querySelector(name);
    this.canvas = find(".canvas");
    this.detail = find(".detail");
    this.figures = find(".figures");
    this.error = find(".error");
    this.how = find(".how");
    this.label = find(".label");
    this.id = `answer-${panesMade++}`;
    this.slots = [];
    this.ghosts = [];
    this.active = -1;
    this.track = null;
    this.expected = 0; // masks that stand here before there is an answer
    this.shown = 0;
    const over = (event) => this.point(this.slots.findIndex((slot) => slot.chip === event.target));
    this.canvas.addEventListener("pointerover", over);
    this.canvas.addEventListener("pointerleave", () => this.point(this.active, true));
    this.canvas.addEventListener("focus", () => this.activate(Math.max(0, this.active)));
    this.canvas.addEventListener("blur", () => this.activate(-1));
    this.canvas.addEventListener("keydown", (event) => this.move(event));
    this.draw(0);
  }

  set name(name) {
    this.title = name;
    this.element.ariaLabel = name;
    this.canvas.ariaLabel = `Tokens of ${name}`;
  }

  fail(said) {
    this.error.textContent = said;
    this.error.hidden = !said;
  }

  // The answer after so many passes. What stays is left as it is, so that nothing flickers.
  draw(pass) {
    const track = this.track;
    this.shown = pass;
    let places = track === null ? this.expected : track.length;
    if (track?.causal) places = track.places.findLastIndex((_, place) => track.token(place, pass) !== null) + 1;
    while (this.slots.length < places) {
      const chip = make("span", { id: `${this.id}-${this.slots.length}` });
      chip.setAttribute("role", "option");
      const slot = { lead: document.createTextNode(""), chip, trail: document.createTextNode("") };
      for (const node of Object.values(slot)) this.canvas.insertBefore(node, this.ghosts[0] ?? null);
      this.slots.push(slot);
    }
    while (this.slots.length > places) {
      for (const node of Object.values(this.slots.pop())) node.remove();
    }
    const open = track?.blocks.findLast(([own]) => own <= Math.max(1, pass))?.[1] ?? Infinity;
    this.slots.forEach((slot, place) => this.#fill(slot, place, pass, open));
    for (const ghost of this.ghosts) ghost.remove();
    const refused = track?.guesses.get(pass)?.refused ?? [];
    this.ghosts = refused.flatMap((text) => [" ", make("span", { className: "chip refused", text: visible(text) })]);
    this.ghosts = this.ghosts.map((ghost) => (ghost === " " ? document.createTextNode(" ") : ghost));
    this.canvas.append(...this.ghosts);
    this.#figures(pass);
    if (this.active >= places) this.activate(places - 1);
    else if (this.active >= 0) this.point(this.active);
  }

  #fill(slot, place, pass, open) {
    const { track } = this;
    const token = track?.token(place, pass) ?? null;
    const form = token ?? track?.final(place); // what will stand here gives the mask its width: lines stay
    const end = track?.behindEnd(place) ?? false;
    let lead = place ? " " : "";
    let trail = "";
    if (form && !end) [lead, trail] = form.text.trim() ? [form.text.match(/^\s*/)[0], ""] : ["", form.text];
    if (slot.lead.data !== lead) slot.lead.data = lead;
    if (slot.trail.data !== trail) slot.trail.data = trail;
    const classes = ["chip"];
    let text = "";
    if (token === null && end && pass >= track.passes) {
      text = "·"; // nothing had to be decided here
      classes.push("end");
    } else if (token === null) {
      classes.push("mask");
      if (track === null || place >= open) classes.push("later");
      slot.chip.dataset.shape = end ? "·" : form ? visible(form.text) : "0000";
    } else {
      text = end ? "·" : visible(token.text);
      classes.push(token.pass ? "token" : "given");
      if (end) classes.push("end");
      if (token.guessed) classes.push("guessed");
      if (pass && token.pass === pass) classes.push("fresh");
      colour(slot.chip, token.pass);
    }
    const name = classes.join(" ");
    if (slot.chip.textContent !== text) slot.chip.textContent = text;
    if (slot.chip.className !== name) slot.chip.className = name;
    if (place === this.active) slot.chip.classList.add("active");
    const said = this.describe(place).map((part) => part.text).join("");
    if (slot.chip.ariaLabel !== said) slot.chip.ariaLabel = said;
  }

  // A token in words: parts, of which the first may be strong.
  describe(place) {
    const token = this.track?.token(place, this.shown);
    if (!token && this.track?.behindEnd(place) && this.shown >= this.track.passes) return [{ text: "behind the end" }];
    if (!token) return [{ text: `place ${place + 1}: still masked` }];
    const parts = [{ text: visible(token.text), strong: true }];
    if (!token.pass) return [...parts, { text: " given" }];
    let said = ` decided in pass ${token.pass}`;
    if (token.guessed) said += ", guessed by the drafter";
    if (token.edited) said += ", in place of another";
    if (token.logprob !== null) said += `, probability ${percent(Math.exp(token.logprob))}`;
    if (this.track.behindEnd(place)) said += ", behind the end";
    return [...parts, { text: said }];
  }

  point(place, leave = false) {
    if (place < 0 && !leave) return;
    const parts = place < 0 || place >= this.slots.length ? [] : this.describe(place);
    this.detail.replaceChildren(...parts.map(({ text, strong }) => make(strong ? "b" : "span", { text })));
  }

  activate(place) {
    this.slots[this.active]?.chip.classList.remove("active");
    this.active = Math.min(place, this.slots.length - 1);
    const slot = this.slots[this.active];
    slot?.chip.classList.add("active");
    if (slot) this.canvas.setAttribute("aria-activedescendant", slot.chip.id);
    else this.canvas.removeAttribute("aria-activedescendant");
    this.point(this.active, true);
  }

  move(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -8, ArrowDown: 8 };
    let to = null;
    if (event.key in steps) to = this.active + steps[event.key];
    if (event.key === "Home") to = 0;
    if (event.key === "End") to = this.slots.length - 1;
    if (to === null || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    this.activate(Math.max(0, to));
  }

  #figures(pass) {
    const { track } = this;
    if (!track?.passes) return this.figures.replaceChildren();
    const { passes, tokens, drafted, accepted } = track.after(pass);
    const found = [
      [tokens === 1 ? "token" : "tokens", tokens],
      [passes === 1 ? "pass" : "passes", passes],
      ["tokens a pass", passes ? short(tokens / passes) : "–"],
    ];
    const seconds = track.seconds ?? track.last;
    const all = track.after(Infinity).tokens;
    if (seconds) found.push(["tokens a second", short(all / seconds)]);
    if (drafted) found.push(["guesses accepted", `${accepted} of ${drafted}`]);
    const row = found.map(([name, value]) => make("div", {}, make("dt", { text: name }), make("dd", { text: value })));
    this.figures.replaceChildren(...row);
  }
}

// A token's text without the blanks before it, which stand between the chips; of blanks alone a sign, before them.
function visible(text) {
  if (text === "") return "∅";
  return text.trim() || (text.includes("\n") ? "↵" : "␣");
}

function percent(share) {
  const value = share * 100;
  return `${value >= 99.95 || value < 0.05 ? value.toFixed(0) : value.toFixed(1)} %`;
}

// --- all answers, and the passes that are shown ---------------------------------------------------------

const view = {
  panes: [],
  shown: 0,
  most: 0,
  playing: false,
  following: false, // events may still come
  since: 0,
  drawn: 0,

  get pace() {
    return Number(at("pace").value);
  },

  show(pass) {
    this.drawn = performance.now();
    this.shown = Math.max(0, Math.min(pass, this.most));
    at("pass").max = this.most;
    at("pass").value = this.shown;
    at("pass-text").textContent = `pass ${this.shown} of ${this.most}`;
    for (const pane of this.panes) pane.draw(this.shown);
    const tracks = this.panes.map((pane) => pane.track).filter(Boolean);
    at("legend").hidden = !tracks.length;
    at("timeline").hidden = !this.panes.length;
    at("play").disabled = at("pass").disabled = !this.most;
    document.body.classList.toggle("drafts", tracks.some((track) => track.guesses.size));
  },

  // There may be more passes than before. Where these come fast, not each of them is drawn.
  refresh(soon = false) {
    clearTimeout(this.later);
    const wait = soon ? 33 - (performance.now() - this.drawn) : 0;
    if (wait > 0) {
      this.later = setTimeout(() => this.refresh(), wait);
      return;
    }
    this.most = Math.max(0, ...this.panes.map((pane) => pane.track?.passes ?? 0));
    this.show(this.playing && !this.pace ? this.most : this.shown);
    this.tick();
  },

  play(playing) {
    this.playing = playing;
    at("play").classList.toggle("playing", playing);
    at("play").ariaLabel = playing ? "Pause" : "Play";
    this.since = performance.now();
    if (playing) this.tick();
  },

  tick() {
    clearTimeout(this.timer);
    if (!this.playing) return;
    const late = performance.now() - this.since;
    if (this.shown < this.most && late >= this.pace) {
      this.since = performance.now();
      this.show(this.pace ? this.shown + 1 : this.most);
    }
    if (this.shown < this.most) this.timer = setTimeout(() => this.tick(), Math.max(0, this.pace - (performance.now() - this.since)));
    else if (!this.following) this.play(false);
  },
};

at("play").addEventListener("click", () => {
  if (!view.playing && view.shown === view.most) view.show(0);
  view.play(!view.playing);
});
at("pass").addEventListener("input", () => {
  view.play(false);
  view.show(Number(at("pass").value));
});
at("pace").addEventListener("change", () => view.tick());
if (matchMedia("(prefers-reduced-motion: reduce)").matches) at("pace").value = "0";
for (const pass of SCALE) {
  const chip = make("span", { className: "chip token", text: pass === LAST_COLOUR ? `${pass}+` : pass });
  colour(chip, pass);
  at("scale").append(chip);
}

// --- a recording ----------------------------------------------------------------------------------------

function replay({ title, problems }) {
  document.title = title;
  at("about").textContent = `A recording of ${title}`;
  at("problems").hidden = false;
  at("choose").hidden = problems.length < 2;
  problems.forEach((problem, i) => at("problem").append(new Option(`${i + 1} of ${problems.length}`, i)));
  const open = () => {
    const { prompt, tracks } = problems[at("problem").value];
    at("problem-text").textContent = prompt;
    view.panes = tracks.map((track) => {
      const pane = new Pane();
      pane.element.querySelector(".controls").remove();
      pane.name = pane.label.textContent = track.model;
      pane.how.textContent = [track.how, track.note].filter(Boolean).join(" · ");
      pane.track = new Track(track);
      return pane;
    });
    at("panes").replaceChildren(...view.panes.map((pane) => pane.element));
    view.shown = 0;
    view.refresh();
    view.show(view.most);
  };
  at("problem").addEventListener("change", open);
  open();
}

// --- a server -------------------------------------------------------------------------------------------

const KEY = "dparallel-api-key";
const server = { models: [], running: null };

function headers() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function reason(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answered ${answer.status} ${answer.statusText}`.trim();
  }
}

function trouble(said) {
  at("trouble").textContent = said;
  at("trouble").hidden = !said;
}

async function load() {
  trouble("");
  let answer;
  try {
    answer = await fetch("v1/models", { headers: headers() });
  } catch {
    return trouble("The server does not answer. Is it still running?");
  }
  at("key").hidden = answer.status !== 401;
  at("ask").hidden = answer.status === 401;
  if (answer.status === 401) {
    if (sessionStorage.getItem(KEY)) trouble("The server does not take this key.");
    sessionStorage.removeItem(KEY);
    return at("key-text").focus();
  }
  if (!answer.ok) return trouble(await reason(answer));
  server.models = (await answer.json()).data;
  at("tokens").placeholder = server.models[0].max_tokens;
  for (const model of server.models.slice(0, 2)) addPane(model.id);
}

function addPane(name) {
  const pane = new Pane();
  const [model, rule, parameter, remove] = pane.element.querySelector(".controls").children;
  pane.label.remove();
  for (const each of server.models) model.append(new Option(each.id, each.id));
  rule.append(...DATA.rules.map((each) => new Option(each.name, each.name)));
  const adapt = () => {
    pane.model = server.models.find((each) => each.id === model.value);
    pane.name = pane.model.id;
    const causal = pane.model.kind === "autoregressive";
    pane.expected = causal ? 0 : pane.model.max_tokens;
    rule.hidden = parameter.hidden = causal;
    if (rule.options[0].value === "") rule.options[0].remove();
    if (!causal) {
      const [, own, rest] = (pane.model.policy ?? "").match(/^([^:+]*):?(.*)$/s);
      const known = DATA.rules.some((each) => each.name === own);
      if (!known) rule.prepend(new Option("the server's", ""));
      rule.value = known ? own : "";
      choose(rest);
    } else {
      const { drafter } = pane.model;
      pane.how.textContent = drafter ? `autoregressive, ${drafter} guesses ahead` : "autoregressive, a token a pass";
    }
    pane.track = null;
    view.refresh();
  };
  const choose = (value = null) => {
    const chosen = DATA.rules.find((each) => each.name === rule.value);
    parameter.disabled = !chosen?.parameters;
    parameter.placeholder = chosen?.parameters ?? "";
    parameter.value = value ?? chosen?.usual ?? "";
    pane.how.textContent = chosen?.does ?? "";
  };
  model.addEventListener("change", adapt);
  rule.addEventListener("change", () => choose());
  parameter.addEventListener("keydown", (event) => event.key === "Enter" && decode());
  remove.addEventListener("click", () => {
    pane.abort?.abort();
    view.panes.splice(view.panes.indexOf(pane), 1);
    pane.element.remove();
    countPanes();
    view.refresh();
  });
  // What `policy` of a request says; undefined: as the server has it.
  pane.policy = () => {
    if (rule.hidden || !rule.value) return undefined;
    const given = parameter.disabled ? "" : parameter.value.trim();
    return rule.value + (given && !given.startsWith("+") ? `:${given}` : given);
  };
  model.value = name;
  adapt();
  view.panes.push(pane);
  at("panes").append(pane.element);
  countPanes();
  view.refresh();
}

function countPanes() {
  at("compare").disabled = view.panes.length >= MOST_PANES;
  for (const pane of view.panes) pane.element.querySelector(".remove").hidden = view.panes.length < 2;
}

// The events of a stream of server-sent events, as JSON.
async function* events(answer) {
  let rest = "";
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const said = part.replace(/^data: /, "");
      if (said === "[DONE]") return;
      yield JSON.parse(said);
    }
  }
}

async function ask(pane, prompt) {
  const body = {
    model: pane.model.id,
    messages: [{ role: "user", content: prompt }],
    stream: true,
    stream_drafts: true,
    stream_options: { include_usage: true },
    logprobs: true,
    policy: pane.policy(),
    max_tokens: Number(at("tokens").value) || undefined,
    temperature: at("temperature").value === "" ? undefined : Number(at("temperature").value),
  };
  pane.fail("");
  pane.track = null;
  pane.draw(0);
  pane.abort = new AbortController();
  const track = new Track({ kind: pane.model.kind });
  const began = performance.now();
  const passed = () => (performance.now() - began) / 1000;
  try {
    const answer = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify(body),
      signal: pane.abort.signal,
    });
    if (!answer.ok) throw new Error(await reason(answer));
    pane.track = track;
    for await (const event of events(answer)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) track.kept = event.usage.completion_tokens;
      const draft = event.choices[0]?.draft;
      if (draft) track.add(draft, passed());
      view.refresh(true);
    }
    if (track.kept === null) throw new Error("The answer broke off.");
    track.seconds = track.last;
    return `${pane.model.id}: ${count(track.kept, "token")} in ${count(track.passes, "pass")}.`;
  } catch (error) {
    if (error.name === "AbortError") return `${pane.model.id}: stopped.`;
    const said = error instanceof TypeError ? "The server does not answer. Is it still running?" : error.message;
    pane.fail(said);
    return `${pane.model.id}: ${said}`;
  } finally {
    pane.abort = null;
    view.refresh();
  }
}

async function decode() {
  const prompt = at("prompt").value;
  if (server.running) return;
  view.show(0);
  view.following = true;
  view.play(true);
  at("start").disabled = true;
  at("stop").disabled = false;
  at("status").textContent = "Decoding…";
  server.running = Promise.all(view.panes.map((pane) => ask(pane, prompt)));
  const said = await server.running;
  server.running = null;
  view.following = false;
  view.tick();
  at("start").disabled = false;
  at("stop").disabled = true;
  at("status").textContent = said.join(" ");
}

function stop() {
  for (const pane of view.panes) pane.abort?.abort();
}

function live() {
  if (DATA.builtin) at("prompt-hint").hidden = false;
  DATA.samples.forEach((sample, i) => at("samples").append(new Option(sample.length > 60 ? `${sample.slice(0, 57)}…` : sample, i)));
  const take = () => (at("prompt").value = DATA.samples[at("samples").value]);
  at("samples").addEventListener("change", take);
  take();
  at("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    decode();
  });
  at("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) decode();
  });
  at("stop").addEventListener("click", stop);
  addEventListener("pagehide", stop);
  at("compare").addEventListener("click", () => {
    const next = server.models.find((each) => !view.panes.some((pane) => pane.model === each));
    addPane((next ?? view.panes.at(-1).model).id);
  });
  at("key").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(KEY, at("key-text").value);
    at("key-text").value = "";
    load();
  });
  load();
}

if (DATA.recording) replay(DATA.recording);
else live();
