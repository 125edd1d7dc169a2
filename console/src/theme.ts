/** Dark or light: as the system says, or as the switch says until the page is reloaded. */
import {computed, effect, signal} from "@preact/signals";

export type Theme = "system" | "light" | "dark";

/** What the switch says. */
export const theme = signal<Theme>("system");

const query = matchMedia("(prefers-color-scheme: dark)");
const systemIsDark = signal(query.matches);
query.addEventListener("change", (event) => {
  systemIsDark.value = event.matches;
});

/** Whether the page is dark. Drawings on a canvas follow it. */
export const isDark = computed(() => (theme.value === "system" ? systemIsDark.value : theme.value === "dark"));

effect(() => {
  document.documentElement.dataset["theme"] = isDark.value ? "dark" : "light";
});
