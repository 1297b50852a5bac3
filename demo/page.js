// What the page does without the server: seeds, Enter, the settings in its address, and pictures enlarged.
const tdm = {
  names: ["prompt", "steps", "seed", "size", "student", "base_first"],
  share(settings) {
    const url = new URL(location);
    settings.forEach((value, i) => {
      if ([null, undefined, "", false].includes(value)) return url.searchParams.delete(tdm.names[i]);
      if (tdm.names[i] !== "size") return url.searchParams.set(tdm.names[i], value);
      const [width, height] = String(value).split(/\s*[x×*]\s*/);
      url.searchParams.set("width", width);
      url.searchParams.set("height", height);
    });
    history.replaceState(null, "", url);
  },
  go() {  // presses the main button of the tab that is open
    [...document.querySelectorAll("button.go")].find((button) => button.offsetParent !== null)?.click();
  },
  draw() {  // draws with the settings as they are
    document.querySelector("#draw").click();
  },
  seed(randomize, seed) {  // an empty seed is a random one, too
    return randomize || seed === null || seed === "" ? Math.floor(Math.random() * 2 ** 31) : seed;
  },
  enlarge(image) {
    const dialog = document.createElement("dialog");
    dialog.className = "enlarged";
    dialog.setAttribute("aria-label", image.alt);
    const close = document.createElement("button");
    close.textContent = "Close";
    close.onclick = () => dialog.close();
    dialog.append(close, image.cloneNode());
    dialog.addEventListener("close", () => dialog.remove());
    document.querySelector(".gradio-container").append(dialog);
    dialog.showModal();
  },
};
document.addEventListener("click", (event) => {
  const image = event.target.closest?.("button.enlarge")?.querySelector("img");
  if (image) tdm.enlarge(image);
});
// Enter draws from the prompt and the seed, Ctrl+Enter from everywhere. Shift+Enter begins a new line.
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.isComposing || event.shiftKey) return;
  const draws = event.target.closest?.("#prompt textarea, #seed input");
  if (!draws && !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  event.stopPropagation();
  event.target.blur();  // hands over what was typed
  tdm.go();
  event.target.focus();
}, true);
