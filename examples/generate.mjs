// Continues a text: node generate.mjs ARTIFACT TEXT NEW_TOKENS, with onnxruntime-node and @huggingface/tokenizers alone.
import fs from "node:fs";
import path from "node:path";
import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-node";

const [folder, prompt, count] = process.argv.slice(2);
const read = (name) => JSON.parse(fs.readFileSync(path.join(folder, name), "utf8"));
const tokenizer = new Tokenizer(read("tokenizer.json"), read("tokenizer_config.json"));
const ends = [read("generation_config.json").eos_token_id].flat();
const session = await ort.InferenceSession.create(path.join(folder, "model.onnx"));

const long = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
let step = tokenizer.encode(prompt).ids;
const room = step.length + Number(count);
const arrays = { float32: Float32Array, int8: Int8Array, uint8: Uint8Array };
const caches = {}, outputs = { logits: null };
for (const { name, type, shape } of session.inputMetadata) {
  if (!name.startsWith("past_key_values.")) continue;
  const sizes = [1, ...shape.slice(1)].map((size) => (typeof size === "number" ? size : room)); // a window has fixed rows
  const cache = new ort.Tensor(type, new arrays[type](sizes.reduce((all, size) => all * size)), sizes);
  caches[name] = cache; // past and present are one buffer, so the kernel appends in place
  outputs[name.replace("past_key_values", "present")] = cache;
}

const tokens = [];
for (let past = 0; tokens.length < Number(count); past += step.length, step = [tokens.at(-1)]) {
  const positions = step.map((_, place) => past + place);
  const feeds = { input_ids: long(step), attention_mask: long(Array(past + step.length).fill(1)), position_ids: long(positions) };
  const given = Object.fromEntries(session.inputNames.map((name) => [name, caches[name] ?? feeds[name]]));
  const { logits } = await session.run(given, outputs);
  const last = logits.data.subarray(-logits.dims.at(-1));
  const token = last.indexOf(last.reduce((most, value) => Math.max(most, value)));
  if (ends.includes(token)) break;
  tokens.push(token);
}
console.log(tokenizer.decode(tokens));
