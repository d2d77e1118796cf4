// SPDX-License-Identifier: Apache-2.0
"use strict";
(function () {
  const form = document.getElementById("filter");
  const cards = Array.from(document.querySelectorAll(".card"));
  const texts = new Map();
  function textOf(card) {
    if (!texts.has(card)) texts.set(card, card.textContent.toLowerCase());
    return texts.get(card);
  }
  function fits(card, source, state, words) {
    if (source && card.dataset.source !== source) return false;
    if (state === "fault" && card.dataset.fault !== "1") return false;
    if (state === "fine" && card.dataset.fault !== "0") return false;
    if (state.startsWith("flag:") && !card.dataset.flags.split(" ").includes(state.slice(5))) return false;
    return words.every(function (word) { return textOf(card).includes(word); });
  }
  function apply() {
    const words = form.elements.find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const card of cards) {
      card.hidden = !fits(card, form.elements.source.value, form.elements.state.value, words);
      shown += card.hidden ? 0 : 1;
    }
    form.elements.count.value = shown + " of " + cards.length;
  }
  function step(direction) {
    const visible = cards.filter(function (card) { return !card.hidden; });
    const offset = form.offsetHeight + 12;
    const next = direction > 0
      ? visible.find(function (card) { return card.getBoundingClientRect().top > offset + 4; })
      : visible.reverse().find(function (card) { return card.getBoundingClientRect().top < offset - 4; });
    if (next) window.scrollBy({ top: next.getBoundingClientRect().top - offset });
  }
  form.hidden = false;
  form.addEventListener("input", apply);
  form.addEventListener("submit", function (event) { event.preventDefault(); });
  document.addEventListener("keydown", function (event) {
    if (event.ctrlKey || event.metaKey || event.altKey || /INPUT|SELECT|TEXTAREA/.test(event.target.tagName)) return;
    if (event.key === "j") step(1);
    if (event.key === "k") step(-1);
  });
  let opened = [];
  window.addEventListener("beforeprint", function () {
    opened = Array.from(document.querySelectorAll("details.negatives:not([open])"));
    for (const one of opened) one.open = true;
  });
  window.addEventListener("afterprint", function () { for (const one of opened) one.open = false; });
  apply();
})();
