"use strict";
// Values under the pointer. Everything can be read without it: axes, legends, tables.
for (const plot of document.querySelectorAll(".plot[data-chart]")) {
  const chart = JSON.parse(plot.dataset.chart);
  const svg = plot.querySelector("svg");
  const guide = plot.appendChild(document.createElement("div"));
  const tip = plot.appendChild(document.createElement("div"));
  guide.className = "guide";
  tip.className = "tip";
  const show = on => { guide.hidden = tip.hidden = !on; };
  const nearest = (points, x) => points.reduce(
    (best, p) => Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best, points[0]);
  const figure = v => Math.abs(v) >= 1e4 ? Math.round(v).toLocaleString("en") : String(Number(v.toPrecision(4)));
  show(false);
  svg.addEventListener("pointerleave", () => show(false));
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), frame = plot.getBoundingClientRect();
    const [low, high] = chart.x;
    const x = low + (high - low) * (event.clientX - box.left) / box.width;
    const lines = chart.lines.filter(line => line.at.length);
    const step = nearest(lines[0].at, x)[0];
    const left = box.left - frame.left + box.width * (step - low) / (high - low);
    tip.textContent = "";
    const head = tip.appendChild(document.createElement("b"));
    head.textContent = chart.along + " " + Math.round(step).toLocaleString("en");
    for (const line of lines) {
      const at = nearest(line.at, step);
      const row = tip.appendChild(document.createElement("span"));
      const where = at[0] === step || (line.kind !== "evaluated" && line.kind !== "again") ? "" : " at " + Math.round(at[0]).toLocaleString("en");
      row.textContent = line.name + where + ": " + figure(at[1]) + (chart.unit && " " + chart.unit);
    }
    guide.style.left = left + "px";
    const right = left > frame.width / 2;
    tip.style.left = right ? "auto" : left + 10 + "px";
    tip.style.right = right ? frame.width - left + 10 + "px" : "auto";
    show(true);
  });
}
