// SPDX-License-Identifier: Apache-2.0
"use strict";
// Cards come from the server as HTML whose values it has escaped; all else is set as text.
(function () {
  const form = document.getElementById("ask");
  const query = document.getElementById("query");
  const hits = document.getElementById("hits");
  let last = new AbortController();
  function dataUrl(file) {
    return new Promise(function (resolve, reject) {
      const reader = new FileReader();
      reader.onload = function () { resolve(reader.result); };
      reader.onerror = function () { reject(reader.error); };
      reader.readAsDataURL(file);
    });
  }
  async function answer(response) {
    if (response.ok) return response;
    const found = await response.json().catch(function () { return {}; });
    throw new Error(found.error ? found.error.message : "the server answers " + response.status);
  }
  async function card(hit, rank, signal) {
    const place = document.createElement("section");
    const line = document.createElement("p");
    line.className = "hit";
    line.textContent = rank + " · cosine " + hit.score.toFixed(4);
    place.append(line);
    hits.append(place);
    const html = await (await answer(await fetch("rows/" + hit.row, { signal: signal }))).text();
    const body = document.createElement("div");
    body.innerHTML = html;
    place.append(body);
  }
  form.addEventListener("submit", async function (event) {
    event.preventDefault();
    last.abort();
    const now = last = new AbortController();
    const fields = form.elements;
    const parts = [];
    query.replaceChildren();
    hits.replaceChildren();
    fields.state.value = "searching…";
    try {
      const file = fields.picture.files[0];
      if (file) parts.push({ type: "image_url", image_url: { url: await dataUrl(file) } });
      if (fields.text.value.trim() || !file) parts.push({ type: "text", text: fields.text.value });
      const body = { messages: [{ role: "user", content: parts }], think: fields.think.value };
      const sent = { method: "POST", body: JSON.stringify(body), signal: now.signal };
      const found = await (await answer(await fetch("search", sent))).json();
      query.innerHTML = found.html;
      await Promise.all(found.hits.map(function (hit, place) { return card(hit, place + 1, now.signal); }));
      fields.state.value = found.hits.length + " rows" + (found.tcot === null ? ", without a T-CoT" : ", with a T-CoT");
    } catch (error) {
      if (now === last) fields.state.value = error.message;
    }
  });
})();
