// Continues a prompt: node transformers_js.mjs NODE_MODULES node|web FOLDER TEXT COUNT; the last line is JSON, with the text as a chat too.
import fs from "node:fs";
import http from "node:http";
import path from "node:path";

const [modules, build, folder, text, count] = process.argv.slice(2);
const library = path.join(modules, "@huggingface/transformers/dist");
const name = path.basename(folder);

async function onNode() {
  const transformers = await import(path.join(library, "transformers.node.mjs"));
  transformers.env.localModelPath = path.dirname(folder);
  transformers.env.allowRemoteModels = false;
  return transformers;
}

async function inBrowser() {
  // The library asks this property whether it runs in Node, and takes files and kernels as a browser does if not.
  Object.defineProperty(process, "release", { value: { name: "browser" } });
  const transformers = await import(path.join(library, "transformers.web.js"));
  const server = http.createServer(serve).listen(0, "127.0.0.1");
  await new Promise((resolve) => server.on("listening", resolve));
  server.unref();
  const { env } = transformers;
  env.allowLocalModels = false;
  env.remoteHost = `http://127.0.0.1:${server.address().port}/`;
  env.remotePathTemplate = "{model}/";
  env.useBrowserCache = false;
  env.useWasmCache = false;
  env.backends.onnx.wasm.wasmPaths = `file://${path.join(modules, "onnxruntime-web/dist")}/`;
  env.backends.onnx.wasm.numThreads = 1;
  return transformers;
}

function serve(request, response) {
  const file = path.join(path.dirname(folder), decodeURIComponent(new URL(request.url, "http://x").pathname));
  if (!fs.existsSync(file)) return response.writeHead(404).end();
  response.writeHead(200, { "content-length": fs.statSync(file).size });
  return fs.createReadStream(file).pipe(response);
}

const { AutoModelForCausalLM, AutoTokenizer, env } = await (build === "web" ? inBrowser() : onNode());
const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModelForCausalLM.from_pretrained(name, { subfolder: "" });
const inputs = tokenizer(text);
const output = await model.generate({ ...inputs, max_new_tokens: Number(count), do_sample: false });
const tokens = output.tolist()[0].slice(inputs.input_ids.dims[1]).map(Number);
const messages = [{ role: "user", content: text }];
const asked = { tokenize: false, add_generation_prompt: true };
const chat = tokenizer.chat_template ? tokenizer.apply_chat_template(messages, asked) : null;
console.log(JSON.stringify({ version: env.version, tokens, chat }));
