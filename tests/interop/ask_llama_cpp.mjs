// Asks llama.cpp, through node-llama-cpp: greedy ids with log-probabilities, and the ids of texts.
// node ask_llama_cpp.mjs MODULES FILE < {"prompts": [[id, ...]], "steps": n, "texts": [text]} > answers
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";
import {readFileSync} from "node:fs";
import path from "node:path";

const [modules, file] = process.argv.slice(2);
const entry = createRequire(path.join(modules, "package.json")).resolve("node-llama-cpp");
const {getLlama} = await import(pathToFileURL(entry).href);
const {prompts, steps, texts} = JSON.parse(readFileSync(0, "utf8"));

const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: file});
// By default keys and values are kept in fp16, which moves log-probabilities.
const context = await model.createContext({
    contextSize: 256, batchSize: 256, flashAttention: false,
    experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"
});
const sequence = context.getSequence();
const whole = {generateNext: {probabilities: true, options: {temperature: 1, topK: 0, topP: 1, minP: 0}}};

async function distributions(tokens) {
    const found = await sequence.controlledEvaluate(tokens.map((token) => [token, whole]));
    return found.map((one) => one.next.probabilities);
}

const answers = [];
for (const prompt of prompts) {
    await sequence.clearHistory();
    const after = await distributions(prompt);
    const logProbs = prompt.slice(1).map((token, place) => Math.log(after[place].get(token)));
    const ids = [];
    let next = after[prompt.length - 1];
    for (let step = 0; step < steps; step++) {
        let best = null;
        for (const [token, probability] of next)
            if (best === null || probability > next.get(best)) best = token;
        ids.push(best);
        logProbs.push(Math.log(next.get(best)));
        [next] = await distributions([best]);
    }
    answers.push({ids, logProbs});
}
const tokens = texts.map((text) => [...model.tokenize(text, false)]);
process.stdout.write(JSON.stringify({answers, tokens, version: llama.llamaCppRelease}));
process.exit(0);
