// What the pages' scripts share. Charts are SVG whose colours are the page's own CSS variables, so that light, dark and
// print need no drawing anew; what is drawn on a canvas asks for a colour and is told when the theme changes.
const charts = (() => {
  // Errors alone are logged: Vega warns of scales without values in every chart that gets its data after it is drawn.
  const options = { ast: true, actions: false, renderer: "svg", hover: false, logLevel: 1 };
  const theme = matchMedia("(prefers-color-scheme: dark)");

  // Draw a Vega-Lite specification into an element; resolves to the chart's Vega view.
  async function draw(element, specification) {
    return (await vegaEmbed(element, specification, options)).view;
  }

  // Draw several, [element, specification, then(view)] each, one after the other, and let the page answer in between.
  async function drawAll(wanted) {
    for (const [element, specification, then] of wanted) {
      const view = await draw(element, specification);
      if (then) then(view);
      await new Promise((resume) => setTimeout(resume));
    }
  }

  // The colour that a CSS variable such as "--kept" has now.
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // Call `paint` now and whenever the colours change, before and after printing too.
  function onTheme(paint) {
    paint();
    theme.addEventListener("change", paint);
    matchMedia("print").addEventListener("change", paint);
  }

  return { draw, drawAll, colour, onTheme };
})();
