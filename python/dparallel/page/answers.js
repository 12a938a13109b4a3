// Answers on the page, and the passes of them that are shown. Everything that a model or a person has written gets
// into the page as text (textContent, dataset), never as markup.

const at = (id) => document.getElementById(id);
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
    for (const [number, guess] of this.guesses) {
      if (number > pass) continue;
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

  fail(message) {
    this.error.textContent = message;
    this.error.hidden = !message;
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
    const open = track?.blocks.findLast(([number]) => number <= Math.max(1, pass))?.[1] ?? Infinity;
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
    const label = this.describe(place).map((part) => part.text).join("");
    if (slot.chip.ariaLabel !== label) slot.chip.ariaLabel = label;
  }

  // A token in words: parts, of which the first may be strong.
  describe(place) {
    const token = this.track?.token(place, this.shown);
    if (!token && this.track?.behindEnd(place) && this.shown >= this.track.passes) return [{ text: "behind the end" }];
    if (!token) return [{ text: `place ${place + 1}: still masked` }];
    const parts = [{ text: visible(token.text), strong: true }];
    if (!token.pass) return [...parts, { text: " given" }];
    let text = ` decided in pass ${token.pass}`;
    if (token.guessed) text += ", guessed and accepted";
    if (token.edited) text += ", in place of another";
    if (token.logprob !== null) text += `, probability ${percent(Math.exp(token.logprob))}`;
    if (this.track.behindEnd(place)) text += ", behind the end";
    return [...parts, { text }];
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
    const figures = [
      [tokens === 1 ? "token" : "tokens", tokens],
      [passes === 1 ? "pass" : "passes", passes],
      ["tokens a pass", passes ? short(tokens / passes) : "–"],
    ];
    const seconds = track.seconds ?? track.last;
    const all = track.after(Infinity).tokens;
    if (seconds) figures.push(["tokens a second", short(all / seconds)]);
    if (drafted) figures.push(["guesses accepted", `${accepted} of ${drafted}`]);
    const row = figures.map(([name, value]) => make("div", {}, make("dt", { text: name }), make("dd", { text: value })));
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
