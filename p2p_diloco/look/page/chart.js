// One figure: a plot for the eye, a sentence for everybody, and all its numbers in a table.
//
// The plot is drawn by uPlot, which a Python package brings; where that is not installed, the table opens instead.

const MIN_POINTS = 2;

export class Chart {
  // series    label, color (a custom property of style.css) and dash of each
  // columns   heads of the table, that of x first
  // text      for each column, what makes text of its numbers
  // axis      of x and of y: what uPlot has, and `text`: a number, and the distance of two ticks, to text; of y also
  //           `range`, where it is not that of the numbers
  constructor(figure, { time, series, columns, text, axis }) {
    this.plotAt = figure.querySelector(".plot");
    this.caption = figure.querySelector("figcaption");
    this.details = figure.querySelector("details");
    this.body = figure.querySelector("tbody");
    Object.assign(this, { time, series, text, axis, data: [[]], plot: null });
    figure.querySelector("thead").replaceChildren(row("th", columns));
    this.details.addEventListener("toggle", () => this.fillTable());
    if (typeof uPlot === "undefined") {
      this.plotAt.hidden = this.details.open = true;
      return;
    }
    new ResizeObserver(() => this.plot?.setSize(this.size())).observe(this.plotAt);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  // `data`: columns of equal length, x first; null where nothing is known.
  update(data, sentence) {
    if (this.caption.textContent !== sentence) this.caption.textContent = sentence;
    if (JSON.stringify(data) === JSON.stringify(this.data)) return;
    this.data = data;
    this.fillTable();
    if (this.plotAt.hidden) return;
    if (this.plot) this.plot.setData(data);
    else if (data[0].length >= MIN_POINTS) this.draw();
  }

  // The newest row first. A closed table costs nothing.
  fillTable() {
    if (!this.details.open) return;
    const rows = this.data[0].map((_, i) => row("td", this.data.map((column, k) => this.text[k](column[i]))));
    this.body.replaceChildren(...rows.reverse());
  }

  draw() {
    if (this.data[0].length < MIN_POINTS) return;
    this.plot?.destroy();
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const line = { stroke: color("--line"), width: 1 };
    const axis = { stroke: color("--soft"), grid: line, ticks: line };
    const options = {
      ...this.size(),
      scales: { x: { time: this.time }, y: { range: this.axis[1].range } },
      axes: [
        { ...axis, ...this.axis[0], labelSize: 20, size: 32, values: texts(this.axis[0]) },
        { ...axis, ...this.axis[1], size: 56, values: texts(this.axis[1]) },
      ],
      series: [
        { label: this.axis[0].label, value: (_, x) => (x === null ? "–" : this.text[0](x)) },
        ...this.series.map(({ label, color: name, dash }, k) => ({
          label, dash, stroke: color(name), width: 2, spanGaps: !this.time,
          points: { size: 5, fill: color(name) },
          value: (_, y) => (y === null ? "–" : this.text[k + 1](y)),
        })),
      ],
      legend: { show: this.series.length > 1, live: matchMedia("(hover: hover)").matches },
      cursor: { drag: { x: false, y: false } },
    };
    this.plot = new uPlot(options, this.data, this.plotAt);
  }

  size() {
    return { width: this.plotAt.clientWidth, height: 260 };
  }
}

function texts({ text }) {
  return (plot, splits, index, space, distance) => splits.map((number) => text(number, distance));
}

export function row(cell, texts) {
  const line = document.createElement("tr");
  line.append(...texts.map((text) => {
    const item = document.createElement(cell);
    item.textContent = text;
    item.className = "number";
    if (cell === "th") item.scope = "col";
    return item;
  }));
  return line;
}
