// Builds the console: one page, one script, one style sheet, and the licenses of the libraries in the script.
//
//   node build.mjs FOLDER    writes them into the folder
//   node build.mjs --test    runs the unit tests, test/*.test.ts
import {spawnSync} from "node:child_process";
import {mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync} from "node:fs";
import {tmpdir} from "node:os";
import {dirname, join} from "node:path";
import {fileURLToPath} from "node:url";
import * as esbuild from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const common = {
  absWorkingDir: here,
  bundle: true,
  format: "esm",
  jsx: "automatic",
  jsxImportSource: "preact",
  logLevel: "warning",
};

async function build(folder) {
  mkdirSync(folder, {recursive: true});
  const result = await esbuild.build({
    ...common,
    entryPoints: {console: "src/main.tsx"},
    outdir: folder,
    minify: true,
    legalComments: "none",
    charset: "utf8",
    metafile: true,
    target: ["es2022", "chrome123", "firefox121", "safari17.5"],
  });
  for (const name of ["console.js", "console.css"]) {
    const path = join(folder, name);
    writeFileSync(path, readFileSync(path, "utf8").trimEnd() + "\n");
  }
  writeFileSync(join(folder, "index.html"), readFileSync(join(here, "src/index.html"), "utf8"));
  writeFileSync(join(folder, "licenses.txt"), licenses(Object.keys(result.metafile.inputs)));
}

/** Return the licenses of the packages that the files come from. */
function licenses(inputs) {
  const packages = new Set();
  for (const input of inputs) {
    const found = /node_modules\/((?:@[^/]+\/)?[^/]+)\//.exec(input);
    if (found) packages.add(found[1]);
  }
  const parts = [...packages].sort().map((name) => {
    const folder = join(here, "node_modules", name);
    const {version, license} = JSON.parse(readFileSync(join(folder, "package.json"), "utf8"));
    const file = readdirSync(folder).find((one) => /^licen[cs]e(\.\w+)?$/i.test(one));
    const text = file ? readFileSync(join(folder, file), "utf8") : `License: ${license}\n`;
    const lines = text.replace(/\r/g, "").replace(/\t/g, "    ").split("\n").map((line) => line.trimEnd());
    return `${name} ${version}\n\n${lines.join("\n").trim()}\n`;
  });
  return parts.join(`\n${"-".repeat(72)}\n\n`);
}

async function test() {
  const folder = mkdtempSync(join(tmpdir(), "console-test-"));
  try {
    const names = readdirSync(join(here, "test")).filter((name) => name.endsWith(".test.ts"));
    await esbuild.build({
      ...common,
      entryPoints: names.map((name) => join("test", name)),
      outdir: folder,
      outExtension: {".js": ".mjs"},
      platform: "node",
    });
    const files = readdirSync(folder).map((name) => join(folder, name));
    return spawnSync(process.execPath, ["--test", "--test-reporter=dot", ...files], {stdio: "inherit"}).status ?? 1;
  } finally {
    rmSync(folder, {recursive: true});
  }
}

const [argument] = process.argv.slice(2);
if (argument === "--test") process.exitCode = await test();
else if (argument) await build(argument);
else throw new Error("give the folder of the built files, or --test");
