// What is on the page, and where: boxes are [left, top, right, bottom].
(() => {
  const box = (rect) => [rect.left, rect.top, rect.right, rect.bottom].map((at, i) => at + (i % 2 ? scrollY : scrollX));
  const rgb = (text) => text.match(/[\d.]+/g).map(Number);
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const colour = rgb(getComputedStyle(element).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const texts = [];
  for (const element of document.body.querySelectorAll('*')) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || element.matches('script, title')) continue;
    const style = getComputedStyle(element);
    const drawn = element instanceof SVGElement;
    const range = document.createRange();
    range.selectNodeContents(element);
    texts.push({
      text: element.textContent.trim(),
      colour: rgb(drawn ? style.fill : style.color).slice(0, 3),
      behind: behind(element),
      size: parseFloat(style.fontSize) * (drawn ? element.getScreenCTM().a : 1),
      box: box((drawn ? element : range).getBoundingClientRect()),
      scrolls: element.closest('.table') !== null,
      group: [...document.querySelectorAll('svg, .bars')].indexOf(element.closest('svg, .bars')),
    });
  }
  const boxes = (name) => [...document.querySelectorAll(name)].map((element) => box(element.getBoundingClientRect()));
  return {
    width: document.documentElement.clientWidth,
    scroll: document.documentElement.scrollWidth,
    texts,
    bars: [...document.querySelectorAll('.track b')].map((bar) => ({ engine: bar.className, box: box(bar.getBoundingClientRect()) })),
    tracks: boxes('.track'),
    charts: boxes('svg'),
    tables: [...document.querySelectorAll('.table')].map((table) => [table.clientWidth, table.scrollWidth]),
  };
})()
