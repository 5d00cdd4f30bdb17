"use strict";
// What every budget buys was computed by the search itself; here it is only looked up.
const data = JSON.parse(document.getElementById("data").textContent);
const small = window.matchMedia("(max-width: 560px)");
const print = window.matchMedia("print");
let views = [];

async function draw() {
  views.forEach((view) => view.finalize());
  const drawn = await Promise.all(
    data.specs.map((spec, number) =>
      vegaEmbed("#chart" + number, spec, {
        mode: "vega-lite",
        renderer: "svg",
        actions: false,
        ast: true,
        config: small.matches ? data.narrow : data.wide,
      }),
    ),
  );
  views = drawn.map((result) => result.view);
  boards.forEach((board) => board.place());
  document.documentElement.dataset.drawn = "yes";
}

// A number as the command line takes it: no exponent, and no more digits than were asked for.
function plain(number, digits) {
  const text = Number(number.toPrecision(digits)).toString();
  if (!text.includes("e")) return text;
  return Number(text).toFixed(20).replace(/0+$/, "").replace(/\.$/, "");
}

function fill(list, pairs) {
  list.replaceChildren();
  for (const [name, value] of pairs) {
    const term = document.createElement("dt");
    const said = document.createElement("dd");
    term.textContent = name;
    said.textContent = value;
    list.append(term, said);
  }
}

// A command breaks between its words alone; its text stays what is copied.
function setWords(element, text) {
  const parts = text.split(" ").map((word) => {
    const part = document.createElement("span");
    part.textContent = word;
    return part;
  });
  element.replaceChildren(...parts.flatMap((part, number) => (number ? [" ", part] : [part])));
}

class Board {
  constructor(element) {
    const find = (name) => element.querySelector(name);
    this.own = data.boards[Number(element.dataset.board)];
    this.stage = find(".stage");
    this.line = find(".line");
    this.flag = find(".flag");
    this.ring = find(".ring");
    this.input = find(".budget");
    this.wrong = find(".wrong");
    this.engine = find(".engine");
    this.parts = Object.fromEntries(["said", "why", "command", "copied", "build"].map((n) => [n, find("." + n)]));
    this.list = find("dl");
    const steps = this.steps;
    this.budget = this.own.start || steps[Math.floor(steps.length / 2)].budget;
    this.listen(find(".copy"), find(".show-kept"));
    this.show();
  }

  get case() {
    return this.own.cases[this.engine ? Number(this.engine.value) : 0];
  }

  get steps() {
    return this.case.steps;
  }

  get view() {
    return views[this.own.chart];
  }

  // The number of the step that a budget reaches; -1 where no shape fits.
  reached(ms) {
    return this.steps.findLastIndex((step) => step.ms <= ms);
  }

  listen(copy, kept) {
    this.input.addEventListener("input", () => this.typed());
    this.input.addEventListener("change", () => this.typed());
    if (this.engine) this.engine.addEventListener("change", () => this.show());
    this.line.addEventListener("keydown", (event) => this.pressed(event));
    this.line.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      this.line.setPointerCapture(event.pointerId);
      this.line.focus({ preventScroll: true });
      event.preventDefault();
    });
    this.line.addEventListener("pointermove", (event) => {
      if (this.line.hasPointerCapture(event.pointerId)) this.dragged(event.clientX);
    });
    copy.addEventListener("click", () => this.copy());
    kept.addEventListener("click", () => showKept(this.step.kept, this.step.shape));
    new ResizeObserver(() => this.place()).observe(this.stage);
  }

  set(text) {
    this.budget = text;
    this.input.value = text;
    this.wrong.textContent = "";
    this.show();
  }

  typed() {
    const number = Number(this.input.value);
    if (!(number > 0) || !Number.isFinite(number)) {
      this.wrong.textContent = "Write a number of milliseconds above zero.";
      return;
    }
    this.wrong.textContent = "";
    this.budget = plain(number, 17);
    this.show(true);
  }

  // Arrows go from one choice to the next, whatever the distance between them.
  pressed(event) {
    const same = (one, other) => one && one.shape === other.shape && one.engine === other.engine;
    const starts = this.steps.filter((step, number) => !same(this.steps[number - 1], step));
    const at = starts.findLastIndex((step) => step.ms <= Number(this.budget));
    const last = starts.length - 1;
    const moves = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 5, PageDown: -5 };
    let next = null;
    if (event.key in moves) next = Math.min(Math.max(at + moves[event.key], 0), last);
    else if (event.key === "Home") next = 0;
    else if (event.key === "End") next = last;
    if (next === null || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.set(starts[next].budget);
  }

  dragged(clientX) {
    const frame = this.frame();
    const at = Math.min(Math.max((clientX - frame.left) / frame.width, 0), 1);
    const scale = this.view.scale("x");
    const [start, end] = scale.range();
    this.set(plain(scale.invert(start + at * (end - start)), 4));
  }

  // The rectangle of the plot itself, inside of its axes.
  frame() {
    return this.stage.querySelector("svg .mark-group.role-frame.root .background").getBoundingClientRect();
  }

  show(typing) {
    const at = this.reached(Number(this.budget));
    this.step = this.steps[Math.max(at, 0)];
    const fits = at >= 0;
    if (!typing) this.input.value = this.budget;
    this.parts.said.textContent = fits ? `${this.step.shape} in ${this.step.engine}` : this.case.nothing;
    this.parts.said.classList.toggle("none", !fits);
    fill(this.list, fits ? this.step.facts : []);
    this.parts.why.textContent = fits ? this.step.why : `From ${this.step.budget} ms on one fits.`;
    this.parts.build.hidden = !fits;
    setWords(this.parts.command, fits ? `${this.case.command}${this.budget}ms` : "");
    this.parts.copied.textContent = "";
    this.fits = fits;
    const told = fits ? `${this.step.shape} in ${this.step.engine}` : "no shape fits";
    this.line.setAttribute("aria-valuetext", `${this.own.metric} at most ${this.budget} ms: ${told}`);
    this.line.setAttribute("aria-valuenow", this.budget);
    this.flag.textContent = `${this.budget} ms`;
    this.place();
  }

  // Where line and ring stand over the picture; shares of its size, so that they stay when it is printed smaller.
  place() {
    if (!this.view) return;
    const frame = this.frame();
    const stage = this.stage.getBoundingClientRect();
    const scale = this.view.scale("x");
    const [start, end] = scale.range();
    const ends = [scale.invert(start), scale.invert(end)];
    const share = (value) => (scale(value) - start) / (end - start);
    const at = Math.min(Math.max(share(Math.max(Number(this.budget), ends[0])), 0), 1);
    const across = (part) => `${(100 * (frame.left - stage.left + part * frame.width)) / stage.width}%`;
    const down = (pixels) => `${(100 * pixels) / stage.height}%`;
    this.line.style.left = across(at);
    this.line.style.top = down(frame.top - stage.top);
    this.line.style.height = down(frame.height);
    this.line.classList.toggle("far", at > 0.6);
    this.line.setAttribute("aria-valuemin", plain(Math.min(ends[0], Number(this.budget)), 4));
    this.line.setAttribute("aria-valuemax", plain(Math.max(ends[1], Number(this.budget)), 4));
    this.line.hidden = false;
    const up = this.view.scale("y");
    const [low, high] = up.range();
    this.ring.style.left = across(share(this.step.x));
    this.ring.style.top = down(frame.top - stage.top + frame.height * ((up(this.step.y) - high) / (low - high)));
    this.ring.hidden = !this.fits;
  }

  async copy() {
    const text = this.parts.command.textContent;
    try {
      await navigator.clipboard.writeText(text);
      this.parts.copied.textContent = "copied";
    } catch {
      // Where the browser forbids it, the text is chosen for the reader to copy.
      window.getSelection().selectAllChildren(this.parts.command);
      this.parts.copied.textContent = "press Ctrl+C to copy";
    }
  }
}

// Which units a shape keeps.
const keptEngine = document.getElementById("kept-engine");
const keptShape = document.getElementById("kept-shape");

function keptOf() {
  return data.kept[keptEngine ? Number(keptEngine.value) : 0];
}

function listShapes() {
  const before = keptShape.value;
  keptShape.replaceChildren(...Object.keys(keptOf().shapes).map((name) => new Option(name, name)));
  if (before in keptOf().shapes) keptShape.value = before;
  drawKept();
}

function svgElement(name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function drawKept() {
  const kept = keptOf();
  const blocks = new Map(kept.shapes[keptShape.value]);
  const narrow = small.matches && !print.matches;
  const [row, left, gap, strip] = narrow ? [18, 56, 8, 150] : [16, 62, 12, 420];
  const square = Math.min(12, (narrow ? 130 : 320) / kept.heads);
  const start = left + kept.heads * square + gap;
  const height = row * kept.blocks + 4;
  const said = describe(kept, blocks);
  const svg = svgElement("svg", { viewBox: `0 0 ${start + strip + 4} ${height}`, role: "img", "aria-label": said });
  for (let block = 0; block < kept.blocks; block++) {
    const top = row * block + 2;
    const pattern = blocks.has(block) ? kept.patterns[blocks.get(block)] : null;
    svg.append(svgElement("text", { x: left - 8, y: top + 10, "text-anchor": "end" }, `block ${block}`));
    for (let head = 0; head < kept.heads; head++) {
      const own = pattern && pattern[0][head] === "1" ? "kept" : "gone";
      const size = Math.max(square - 2, 1);
      svg.append(svgElement("rect", { x: left + head * square, y: top, width: size, height: 11, class: own }));
    }
    if (pattern) drawNeurons(svg, pattern[1], start, top, strip);
    svg.append(svgElement("rect", { x: start, y: top, width: strip, height: 11, class: "gone" }));
  }
  document.getElementById("kept-picture").replaceChildren(svg);
  document.getElementById("kept-said").textContent = said;
}

function drawNeurons(svg, shares, start, top, strip) {
  const width = strip / shares.length;
  [...shares].forEach((digit, part) => {
    if (digit === "0") return;
    const place = { x: start + part * width, y: top, width, height: 11, class: "bar", opacity: Number(digit) / 9 };
    svg.append(svgElement("rect", place));
  });
}

function range(counts) {
  const [low, high] = [Math.min(...counts), Math.max(...counts)];
  return low === high ? `${low}` : `${low} to ${high}`;
}

function describe(kept, blocks) {
  const patterns = [...blocks.values()].map((number) => kept.patterns[number]);
  const heads = range(patterns.map((pattern) => [...pattern[0]].filter((bit) => bit === "1").length));
  const neurons = range(patterns.map((pattern) => pattern[2]));
  const gone = [...Array(kept.blocks).keys()].filter((block) => !blocks.has(block));
  const removed = gone.length ? `without block${gone.length > 1 ? "s" : ""} ${gone.join(", ")}` : "no block removed";
  return (
    `${keptShape.value} keeps ${blocks.size} of ${kept.blocks} blocks (${removed}); in each, ${heads} of ` +
    `${kept.heads} heads and ${neurons} of ${kept.neurons} neurons.`
  );
}

function showKept(number, shape) {
  if (keptEngine) keptEngine.value = String(number);
  listShapes();
  keptShape.value = shape;
  drawKept();
  document.getElementById("kept").scrollIntoView();
  keptShape.focus({ preventScroll: true });
}

// Theme, and what print needs.
for (const choice of document.querySelectorAll("input[name=theme]")) {
  choice.addEventListener("change", () => {
    if (choice.value === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = choice.value;
  });
}

let opened = [];
print.addEventListener("change", () => {
  if (print.matches) {
    opened = [...document.querySelectorAll("details:not([open])")];
    opened.forEach((each) => (each.open = true));
  } else {
    opened.forEach((each) => (each.open = false));
  }
});

const boards = [...document.querySelectorAll(".board")].map((element) => new Board(element));
if (keptEngine) keptEngine.addEventListener("change", listShapes);
keptShape.addEventListener("change", drawKept);
listShapes();
keptShape.value = boards[0].step.shape;
drawKept();
document.querySelectorAll("details .command").forEach((each) => setWords(each, each.textContent));
small.addEventListener("change", draw);
small.addEventListener("change", drawKept);
draw();
