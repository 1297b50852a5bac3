// What the page does without the server: Ctrl+Enter, and the settings in its address.
const tdm = {
  names: ["prompt", "steps", "seed", "size", "student", "base_first"],
  share(settings) {
    const url = new URL(location);
    settings.forEach((value, i) => {
      if (tdm.names[i] === "base_first" && !value) return url.searchParams.delete("base_first");
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
};
document.addEventListener("keydown", (event) => {
  if (!(event.ctrlKey || event.metaKey) || event.key !== "Enter") return;
  event.preventDefault();
  event.target.blur();  // hands over what was typed
  tdm.go();
  event.target.focus();
}, true);
