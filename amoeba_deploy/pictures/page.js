const small = window.matchMedia("(max-width: 560px)");
let views = [];

async function draw() {
  views.forEach((view) => view.finalize());
  views = await Promise.all(
    specs.map((spec, number) =>
      vegaEmbed("#chart" + number, spec, {
        mode: "vega-lite",
        renderer: "svg",
        actions: false,
        ast: true,
        config: small.matches ? narrow : wide,
      }),
    ),
  );
}

small.addEventListener("change", draw);
draw();
