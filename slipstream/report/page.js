// Draws every chart of the page as SVG: text stays text, and colours follow the style sheet.
const { config, specs } = JSON.parse(document.getElementById("charts").textContent);
const drawn = [...document.querySelectorAll("[data-chart]")].map(async (element) => {
  try {
    await vegaEmbed(element, specs[element.dataset.chart], {
      actions: false,
      config,
      mode: "vega-lite",
      renderer: "svg",
      tooltip: { disableDefaultStyle: true },
    });
    // a drawing that is wider than its column shrinks as a picture would
    for (const svg of element.querySelectorAll("svg")) {
      svg.style.maxWidth = "100%";
      svg.style.height = "auto";
    }
  } catch (error) {
    element.textContent = `This chart could not be drawn: ${error.message}`;
    console.error(error);
  }
});
Promise.all(drawn).then(() => document.body.setAttribute("data-drawn", drawn.length));
