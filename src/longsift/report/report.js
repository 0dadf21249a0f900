// The report's charts, and its slider: what another share of every group would keep. `report` is what Python gave.
(() => {
  const { slider, histogram, figures, speed, ranks } = report;
  const find = (selector, within = document) => within.querySelector(selector);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // --- numbers as words.py writes them --------------------------------------------------------------------

  const count = (value) => value.toLocaleString("en-US");
  function digits(value) {
    if (value === 0) return "0";
    const decimals = Math.min(Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value)))), 6);
    const options = { minimumFractionDigits: decimals, maximumFractionDigits: decimals, roundingMode: "halfEven" };
    return value.toLocaleString("en-US", options).replace("-", "−");
  }
  function tokens(value) {
    for (const [factor, prefix] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
      if (value >= 0.9995 * factor) return `${digits(value / factor)} ${prefix}`;
    return count(value);
  }
  function number(value) {
    if (value === null) return "–";
    const size = Math.abs(value);
    if (size === 0 || (size >= 1e-3 && size < 1e5)) return digits(value);
    const power = Math.floor(Math.log10(size));
    const raised = String(power).replace(/./g, (sign) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(sign)]);
    return `${digits(value / 10 ** power)}·10${raised}`;
  }
  const three = { maximumSignificantDigits: 3, useGrouping: false, roundingMode: "halfEven" };
  const share = (value) => `${(100 * value).toLocaleString("en-US", three)} %`;

  // --- what a share keeps ---------------------------------------------------------------------------------

  const sum = (values) => values.reduce((total, value) => total + value, 0);

  // {windows, tokens, cut} that position `at` of the slider keeps in a group.
  function keptAt(group, at) {
    let [step, last, windows, total] = [0, -1, 0, 0];
    for (let i = 0; i < group.step.length && (step += group.step[i]) <= at; i++) {
      windows += group.windows[i];
      total += group.tokens[i] ?? group.windows[i] * group.tokens;
      last = i;
    }
    return { windows, tokens: total, cut: group.cut.length && last >= 0 ? group.cut[last] : null };
  }

  // A group's bars when its best `kept` windows are kept: those that stand behind come after all others.
  function bars(group, kept) {
    const width = (slider.high - slider.low) / group.front.length;
    const found = group.front.map((front, i) => ({
      x: slider.low + i * width,
      x2: slider.low + (i + 1) * width,
      n: front + (group.behind ? group.behind[i] : 0),
      kept: 0,
    }));
    for (const counts of [group.front, group.behind || []])
      for (let i = counts.length - 1; i >= 0; i--) {
        const taken = Math.min(counts[i], kept);
        found[i].kept += taken;
        kept -= taken;
      }
    return found.filter((bar) => bar.n);
  }

  // --- the page -------------------------------------------------------------------------------------------

  const input = find("#share");
  const reset = find("#reset");
  const command = find("#command");
  const cells = all("[data-live], #percent, #total-windows, #total-tokens, [data-kept]");
  const asSelected = cells.map((cell) => cell.textContent);
  const views = [];
  let current = slider.selected;
  let drawing = false;

  async function redraw() {
    if (drawing) return; // it goes on to what is current then
    drawing = true;
    for (let shown = null; shown !== current; ) {
      shown = current;
      for (const [index, view] of views.entries()) {
        if (!view || shown !== current) continue;
        await fill(view, slider.groups[index], shown[index]);
        await new Promise((resume) => setTimeout(resume));
      }
    }
    drawing = false;
  }

  const fill = (view, group, kept) =>
    view
      .data("bars", bars(group, kept.windows))
      .data("cut", kept.cut === null ? [] : [{ x: kept.cut }])
      .runAsync();

  function write(row, kept, [, of]) {
    const values = {
      windows: count(kept.windows),
      tokens: tokens(kept.tokens),
      share: of ? share(kept.tokens / of) : "–",
      cut: number(kept.cut),
    };
    for (const cell of all("[data-live]", row)) cell.textContent = values[cell.dataset.live];
  }

  function move() {
    const at = Number(input.value);
    current = slider.groups.map((group) => keptAt(group, at));
    const total = {
      windows: sum(current.map((kept) => kept.windows)),
      tokens: sum(current.map((kept) => kept.tokens)),
      cut: null,
    };
    slider.groups.forEach((group, index) => {
      write(find(`[data-group="${index}"]`), current[index], group.of);
      const label = find(`[data-kept="${index}"]`);
      if (label) label.textContent = count(current[index].windows);
    });
    write(find('[data-group="total"]'), total, [0, sum(slider.groups.map((group) => group.of[1]))]);
    find("#percent").textContent = share(at / slider.steps);
    find("#total-windows").textContent = count(total.windows);
    find("#total-tokens").textContent = tokens(total.tokens);
    command.textContent = `${command.dataset.command} --keep ${at / slider.steps}`;
    state(true);
    redraw();
  }

  function state(moved) {
    find("#scores").classList.toggle("moved", moved);
    reset.disabled = !moved;
    input.setAttribute("aria-valuetext", `${find("#percent").textContent}, ${find("#total-windows").textContent} windows`);
  }

  input.value = slider.position; // browsers restore a form's values
  state(false);
  input.addEventListener("input", move);
  reset.addEventListener("click", () => {
    cells.forEach((cell, i) => (cell.textContent = asSelected[i]));
    command.textContent = "\u00a0";
    input.value = slider.position;
    current = slider.selected;
    state(false);
    input.focus();
    redraw();
  });

  // --- dependency maps ------------------------------------------------------------------------------------

  // Shares are bytes, by their logarithm. The first column, which every text attends to, and the diagonal take no part
  // in the choice of the range of colours.
  function paint(canvas) {
    const bytes = Uint8Array.from(atob(canvas.dataset.map), (character) => character.charCodeAt(0));
    const side = canvas.width;
    const inner = [];
    for (let row = 2; row < side; row++) for (let at = 1; at < row; at++) inner.push(bytes[(row * (row + 1)) / 2 + at]);
    inner.sort((a, b) => a - b);
    const low = inner[Math.floor(inner.length * 0.02)] ?? 0;
    const high = Math.max(inner[Math.floor(inner.length * 0.995)] ?? 0, low + 1);
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.fillStyle = charts.colour("--kept");
    context.fillRect(0, 0, 1, 1);
    const colour = context.getImageData(0, 0, 1, 1).data.slice(0, 3);
    const image = context.createImageData(side, side);
    for (let row = 0, place = 0; row < side; row++)
      for (let column = 0; column <= row; column++, place++) {
        const part = Math.min(Math.max((bytes[place] - low) / (high - low), 0), 1);
        image.data.set([...colour, 255 * (0.05 + 0.95 * part)], 4 * (row * side + column));
      }
    context.putImageData(image, 0, 0);
  }

  charts.onTheme(() => all("[data-map]").forEach(paint));

  const wanted = all("[data-histogram]").map((element) => {
    const index = Number(element.dataset.histogram);
    const specification = { ...histogram, description: `${histogram.description}: ${slider.groups[index].name}` };
    return [element, specification, (view) => ((views[index] = view), fill(view, slider.groups[index], current[index]))];
  });
  for (const element of all("[data-figure]")) wanted.push([element, figures[element.dataset.figure]]);
  if (ranks) wanted.push([find("#ranks"), ranks]);
  if (speed) wanted.push([find("#speed"), speed]);
  charts.drawAll(wanted).then(() => (document.documentElement.dataset.drawn = "yes"));
})();
