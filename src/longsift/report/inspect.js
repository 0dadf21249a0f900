// The page of one window: the map on its canvas, the pair of passages that is pointed at or held, and the text.
(() => {
  const SOURCES = 8; // earlier passages that are listed
  const LEAP = 8; // passages that Shift and an arrow move by

  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const { spans, span, starts, levels, smallest } = data;
  const elements = [...document.querySelectorAll("[data-passage]")];
  const texts = elements.map((element) => element.querySelector(".words").textContent);
  const layerChoice = $("layer"), headChoice = $("head"), farChoice = $("far");

  // --- shares ---

  const shareOf = Float64Array.from({ length: levels + 1 }, (_, level) =>
    level ? smallest ** (1 - (level - 1) / (levels - 1)) : 0,
  );
  const unpacked = new Map();

  // The cells of a map, row after row of its lower triangle, as levels.
  function cellsOf(name) {
    if (!unpacked.has(name)) {
      const bytes = atob(data.maps[name]);
      unpacked.set(name, Uint8Array.from({ length: bytes.length }, (_, i) => bytes.charCodeAt(i)));
    }
    return unpacked.get(name);
  }
  const place = (row, column) => (row * (row + 1)) / 2 + column;
  const shareAt = (cells, row, column) => shareOf[cells[place(row, column)]];

  function chosenMap() {
    const layer = layerChoice.value;
    const head = headChoice && !headChoice.disabled ? headChoice.value : "";
    return head === "" ? layer : `${layer}.${head}`;
  }

  // What each passage draws from passages at least `far` before it; the first one, the sink, left out.
  function farShares(cells, far) {
    return starts.map((_, row) => {
      let sum = 0;
      for (let column = 1; column <= row - far; column++) sum += shareAt(cells, row, column);
      return sum;
    });
  }

  // The same for the map that is chosen; the largest of the layers is that of their sums, not the sum of largest cells.
  function chosenFarShares(far) {
    if (layerChoice.value !== "max") return farShares(cells, far);
    const layers = Object.keys(data.maps).filter((name) => /^\d+$/.test(name));
    const each = layers.map((name) => farShares(cellsOf(name), far));
    return starts.map((_, row) => Math.max(...each.map((shares) => shares[row])));
  }

  function percent(share) {
    const value = 100 * share;
    if (value < 0.001) return value ? "under 0.001 %" : "0 %";
    return `${value.toFixed(value >= 10 ? 0 : value >= 1 ? 1 : value >= 0.1 ? 2 : 3)} %`;
  }
  const count = (value) => value.toLocaleString("en-US");
  const tokens = (passage) => `tokens ${count(starts[passage])}–${count(starts[passage] + span - 1)}`;

  // --- the map ---

  const board = $("map"), canvas = board.querySelector("canvas");
  let cells, range;

  // The smallest and largest share that have colours of their own: without the first column and the diagonal, of
  // which a few cells would leave no colour to the others.
  function findRange() {
    const counts = new Uint32Array(levels + 1);
    let total = 0;
    for (let row = 2; row < spans; row++) {
      for (let column = 1; column < row; column++) counts[cells[place(row, column)]]++;
      total += row - 1;
    }
    const at = (part) => {
      let left = part * total;
      return counts.findIndex((many) => (left -= many) <= 0);
    };
    return { low: shareOf[Math.max(at(0.02), 1)], high: shareOf[Math.max(at(0.999), 2)] };
  }

  function paint() {
    const linear = document.querySelector("[name=colours]:checked").value === "linear";
    const { high } = range;
    const low = linear ? 0 : Math.min(range.low, high / 2);
    const strengths = shareOf.map((share) => {
      const part = linear ? share / high : share ? Math.log(share / low) / Math.log(high / low) : 0;
      return 255 * (0.04 + 0.96 * Math.min(Math.max(part, 0), 1));
    });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.fillStyle = charts.colour("--kept");
    context.fillRect(0, 0, 1, 1);
    const [red, green, blue] = context.getImageData(0, 0, 1, 1).data;
    const image = context.createImageData(spans, spans);
    for (let row = 0; row < spans; row++) {
      for (let column = 0; column <= row; column++) {
        image.data.set([red, green, blue, strengths[cells[place(row, column)]]], 4 * (row * spans + column));
      }
    }
    context.putImageData(image, 0, 0);
    $("low").textContent = linear ? "0 %" : `≤ ${percent(low)}`;
    $("middle").textContent = percent(linear ? high / 2 : Math.sqrt(low * high));
    $("high").textContent = `≥ ${percent(high)}`;
  }

  function box(element, row, column, rows = 1, columns = 1) {
    const style = { left: column, top: row, width: columns, height: rows };
    for (const [side, value] of Object.entries(style)) element.style[side] = `${(100 * value) / spans}%`;
  }

  // --- the pair of passages ---

  let held = null; // [row, column] that was clicked
  let pointed = null; // that the pointer or the keys are at

  function showPair() {
    const pair = pointed || held;
    $("cursor").hidden = !pointed;
    $("row").hidden = $("column").hidden = !pointed;
    $("pinned").hidden = !held;
    $("pair").classList.toggle("fixed", Boolean(held) && (!pointed || String(pointed) === String(held)));
    if (held) box($("pinned"), ...held);
    if (!pair) return;
    const [row, column] = pair;
    if (pointed) {
      box($("cursor"), row, column);
      box($("row"), row, 0, 1, row + 1);
      box($("column"), column, column, spans - column, 1);
    }
    show("query", row, "attends");
    show("key", column, column === row ? "to itself" : "is attended to");
    const said = document.createElement("b");
    said.textContent = percent(shareAt(cells, row, column));
    const back = row - column;
    const where = back ? `, ${count(back * span)} tokens before it` : " itself";
    $("says").replaceChildren(
      said,
      ` of the attention of passage ${row} (${tokens(row)}) goes to passage ${column} (${tokens(column)})${where}.`,
    );
  }

  function show(id, passage, does) {
    $(`${id}-title`).textContent = `Passage ${passage} ${does} · ${tokens(passage)}`;
    $(`${id}-link`).href = `#p${passage}`;
    if ($(id).textContent !== texts[passage]) $(id).scrollTop = 0;
    $(id).textContent = texts[passage];
  }

  function hold(pair) {
    held = pair;
    showPair();
  }

  function cellUnder(event) {
    const { left, top, width, height } = canvas.getBoundingClientRect();
    const at = (offset, size) => Math.min(Math.max(Math.floor((offset / size) * spans), 0), spans - 1);
    const row = at(event.clientY - top, height);
    const column = at(event.clientX - left, width);
    return column <= row ? [row, column] : null;
  }

  board.addEventListener("pointermove", (event) => {
    pointed = cellUnder(event);
    showPair();
  });
  board.addEventListener("pointerleave", () => {
    pointed = null;
    showPair();
  });
  board.addEventListener("click", (event) => {
    const pair = cellUnder(event);
    if (pair) hold(pair);
  });
  board.addEventListener("blur", () => {
    pointed = null;
    showPair();
  });
  board.addEventListener("keydown", (event) => {
    const step = event.shiftKey ? LEAP : 1;
    const [row, column] = pointed || held;
    const moves = { ArrowUp: [-step, 0], ArrowDown: [step, 0], ArrowLeft: [0, -step], ArrowRight: [0, step] };
    const limit = (value, most) => Math.min(Math.max(value, 0), most);
    if (moves[event.key]) {
      const [down, right] = moves[event.key];
      const lower = limit(row + down, spans - 1);
      pointed = [lower, limit(column + right, lower)];
    } else if (event.key === "Enter" || event.key === " ") {
      held = [row, column];
    } else if (event.key === "Escape") {
      held = null;
      pointed = [row, column];
    } else {
      return;
    }
    event.preventDefault();
    showPair();
  });

  // --- the text ---

  const narrow = matchMedia("(max-width: 860px)"); // as in the style
  let chosen = 0;
  let drawn; // far share by passage

  function showText() {
    const far = Number(farChoice.value);
    drawn = chosenFarShares(far);
    const most = Math.max(...drawn);
    elements.forEach((element, row) => {
      element.style.setProperty("--far", most ? drawn[row] / most : 0);
      element.querySelector("b").textContent = row > far ? percent(drawn[row]) : "–";
      const label = `Passage ${row}, ${tokens(row)}: ${row > far ? percent(drawn[row]) : "nothing"} from far back`;
      element.title = label;
      element.setAttribute("aria-label", label);
    });
  }

  function choose(passage) {
    elements[chosen].removeAttribute("aria-current");
    elements[chosen].removeAttribute("tabindex"); // so that links to passages move no focus
    chosen = passage;
    elements[chosen].setAttribute("aria-current", "true");
    elements[chosen].tabIndex = 0;
    showSources();
  }

  function sourcesOf(passage) {
    const found = [];
    for (let column = 1; column < passage; column++) found.push([column, shareAt(cells, passage, column)]);
    return found.sort((a, b) => b[1] - a[1]).slice(0, SOURCES);
  }

  function make(name, className, ...content) {
    const element = document.createElement(name);
    if (className) element.className = className;
    element.append(...content);
    return element;
  }

  function showSources() {
    const far = Number(farChoice.value);
    const found = sourcesOf(chosen);
    $("chosen").textContent = `Passage ${chosen} draws on`;
    $("chosen-says").textContent =
      `${tokens(chosen)[0].toUpperCase()}${tokens(chosen).slice(1)}; ` +
      (chosen > far
        ? `${percent(drawn[chosen])} of its attention goes ${count(far * span)} tokens back or more.`
        : "nothing before it is far.") +
      (found.length ? " Most first, the first passage and its own left out:" : " No passage before it counts.");
    elements.forEach((element) => element.classList.remove("source"));
    $("sources").replaceChildren(
      ...found.map(([column, share]) => {
        elements[column].classList.add("source");
        const link = make("a", "", `passage ${column}`);
        link.href = `#p${column}`;
        const beside = make("button", "", "side by side");
        beside.type = "button";
        beside.setAttribute("aria-label", `Passages ${chosen} and ${column} side by side`);
        const pair = [chosen, column];
        beside.addEventListener("click", () => {
          hold(pair);
          $("pair").scrollIntoView({ block: "center" });
        });
        const measure = make("div", "measure");
        measure.style.width = `${(100 * share) / (found[0][1] || 1)}%`;
        const snippet = make("div", "snippet", texts[column].trim().slice(0, 160));
        snippet.dir = "auto";
        const line = make("div", "line", make("b", "", percent(share)), link, beside);
        line.append(make("span", "soft", `${count((chosen - column) * span)} back`));
        return make("li", "", line, measure, snippet);
      }),
    );
  }

  // Where there is no room beside the text, the list goes below the passage that a reader chooses.
  function chooseHere(passage) {
    const list = document.querySelector(".sources");
    choose(passage);
    if (narrow.matches) elements[chosen].after(list);
    else document.querySelector(".reading").append(list);
  }

  $("document").addEventListener("click", (event) => {
    const passage = event.target.closest("[data-passage]");
    if (!passage) return;
    chooseHere(Number(passage.dataset.passage));
    passage.focus({ preventScroll: true });
  });
  $("document").addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step || !event.target.closest("[data-passage]")) return;
    event.preventDefault();
    chooseHere(Math.min(Math.max(chosen + step, 0), spans - 1));
    elements[chosen].focus();
  });

  // --- the chart ---

  const curve = JSON.parse($("curve-chart").textContent);
  let view = null;

  function showCurve() {
    if (!view) return;
    const chosen = chosenFarShares(data.quarter).map((share, row) => ({
      position: starts[row] + span / 2,
      share: 100 * share,
      of: data.chosen,
    }));
    view.data("lines", [...curve.data.values, ...chosen]).runAsync();
  }

  // --- choices ---

  function showMap() {
    if (headChoice) headChoice.disabled = !(`${layerChoice.value}.0` in data.maps);
    cells = cellsOf(chosenMap());
    range = findRange();
    paint();
    showText();
    showPair();
    showSources();
    showCurve();
  }

  layerChoice.addEventListener("change", showMap);
  if (headChoice) headChoice.addEventListener("change", showMap);
  farChoice.addEventListener("change", () => {
    showText();
    showSources();
  });
  for (const radio of document.querySelectorAll("[name=colours]")) radio.addEventListener("change", paint);

  showMap();
  choose(drawn.indexOf(Math.max(...drawn)));
  const farther = sourcesOf(chosen).find(([column]) => chosen - column >= Number(farChoice.value));
  hold([chosen, farther ? farther[0] : 0]);
  $("document").scrollTop = elements[chosen].offsetTop - 60;
  charts.onTheme(paint);
  charts.draw($("curve"), structuredClone(curve)).then((made) => {
    view = made;
    showCurve();
  });
})();
