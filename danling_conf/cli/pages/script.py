"""Script of all pages: tooltips, and tables that sort by a click. Pages are readable without it."""

from __future__ import annotations

SCRIPT = """
(() => {
  const tip = document.getElementById('tip');
  const show = (event, words) => {
    tip.textContent = words; tip.style.display = 'block';
    const box = tip.getBoundingClientRect();
    const left = event.clientX + 14 + box.width > innerWidth ? event.clientX - box.width - 14 : event.clientX + 14;
    tip.style.left = Math.max(4, left) + 'px';
    tip.style.top = Math.min(event.clientY + 14, innerHeight - box.height - 6) + 'px';
  };
  const number = value => Math.abs(value) >= 1e6 || (value && Math.abs(value) < 1e-3)
    ? value.toExponential(3) : String(+value.toPrecision(6));
  for (const svg of document.querySelectorAll('svg[data-lines]')) {
    const lines = JSON.parse(svg.dataset.lines), cross = svg.querySelector('.cross');
    svg.addEventListener('pointermove', event => {
      const box = svg.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
      let best = null;
      for (const line of lines) for (const point of line.points)
        if (best === null || Math.abs(point[0] - x) < Math.abs(best[0] - x)) best = point;
      if (!best) return;
      const said = [svg.dataset.x + ' ' + best[2]];
      for (const line of lines) {
        let near = null;
        for (const point of line.points) if (!near || Math.abs(point[0] - best[0]) < Math.abs(near[0] - best[0])) near =
        point;
        if (near && Math.abs(near[0] - best[0]) < 12) said.push(line.name + ': ' + number(near[3]));
      }
      cross.setAttribute('x1', best[0]); cross.setAttribute('x2', best[0]); cross.style.visibility = 'visible';
      show(event, said.join('\\n'));
    });
    svg.addEventListener('pointerleave', () => { cross.style.visibility = 'hidden'; tip.style.display = 'none'; });
  }
  for (const mark of document.querySelectorAll('[data-tip]')) {
    mark.addEventListener('pointermove', event => show(event, mark.dataset.tip));
    mark.addEventListener('pointerleave', () => { tip.style.display = 'none'; });
  }
  for (const head of document.querySelectorAll('th')) head.addEventListener('click', () => {
    const body = head.closest('table').tBodies[0], column = head.cellIndex, down = head.dataset.sorted === 'up';
    for (const other of head.parentNode.cells) delete other.dataset.sorted;
    head.dataset.sorted = down ? 'down' : 'up';
    const value = row => { const words = row.cells[column].textContent, size = parseFloat(words.replace(/,/g, ''));
      return [Number.isNaN(size) ? 1 : 0, size, words]; };
    const order = (a, b) => a[0] - b[0] || (a[0] ? a[2].localeCompare(b[2]) : a[1] - b[1]);
    const rows = [...body.rows].sort((a, b) => (down ? -1 : 1) * order(value(a), value(b)));
    for (const row of rows) body.append(row);
  });
})();
"""
