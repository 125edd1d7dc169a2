/** esbuild gathers style sheets into one file. */
declare module "*.css";
