// Runs kernelgen's kernels on a WebGPU device: in browsers, Deno, and Node with the webgpu package.
import { blocks, kernels, rules } from './kernels.js';

export { blocks, kernels, rules };
export const precisions = ['auto', 'fp32', 'fp16', 'bf16', 'int8'];

/** Features of a device, as kernels name them. */
export function featuresOf(device) {
  const language = globalThis.navigator?.gpu?.wgslLanguageFeatures ?? [];
  return new Set([...device.features, ...language]);
}

// M as kernels tell it apart: each of the first eight, then powers of two.
const bucket = (m) => {
  let top = 16;
  while (top < m && top < 4096) top *= 2;
  return m <= 8 ? m : top;
};
const ratio = (a, b) => Math.max(a, b) / Math.max(Math.min(a, b), 1);

/**
 * The name of the kernel that serves x (M, K) by weights (N, K): what was tuned for the nearest
 * shape, as high if M <= 8, else at most twice as high or low, at most four times as wide or deep,
 * else the first default that the features allow; null where there is none.
 */
export function choose(format, precision, M, N, K, features = new Set()) {
  const op = M <= 8 ? 'matvec' : 'matmul';
  const rule = rules.find((r) => r.format === format && r.precision === precision && r.op === op);
  const can = ({ kernel }) => kernels[kernel].features.every((one) => features.has(one));
  let [nearest, least] = [null, Infinity];
  for (const point of rule?.points ?? []) {
    const rows = bucket(M) === bucket(point.m) ? 1 : ratio(bucket(M), point.m);
    const [n, k] = [ratio(N, point.n), ratio(K, point.k)];
    if (rows > (M <= 8 ? 1 : 2) || n > 4 || k > 4 || rows * n * k >= least || !can(point)) continue;
    [nearest, least] = [point.kernel, rows * n * k];
  }
  const usual = rule?.choices.find((one) => one.m[0] <= M && M <= one.m[1] && can(one));
  return nearest ?? usual?.kernel ?? null;
}

const loaded = new WeakMap();

/** A kernel compiled for a device, once; rejects with the compiler's first complaint. */
export function loadKernel(device, name) {
  if (!loaded.has(device)) loaded.set(device, new Map());
  const known = loaded.get(device);
  if (!known.has(name)) known.set(name, compile(device, name));
  return known.get(name);
}

async function compile(device, name) {
  const kernel = kernels[name];
  if (!kernel) throw new Error(`kernel ${name} is not in this package`);
  const module = device.createShaderModule({ code: kernel.source });
  const { messages } = await module.getCompilationInfo();
  const wrong = messages.find((one) => one.type === 'error');
  if (wrong) throw new Error(`${name}, line ${wrong.lineNum}: ${wrong.message}`);
  const types = kernel.buffers.map((one) => (one.role === 'in' ? 'read-only-storage' : 'storage'));
  // written out: an automatic layout leaves out what a kernel does not read
  const layout = device.createBindGroupLayout({
    entries: [...types, 'uniform'].map((type, binding) => (
      { binding, visibility: GPUShaderStage.COMPUTE, buffer: { type } })),
  });
  const pipeline = await device.createComputePipelineAsync({
    layout: device.createPipelineLayout({ bindGroupLayouts: [layout] }),
    compute: { module, entryPoint: name },
  });

  /** Records a launch; buffers by name, results and scratch memory made where they are missing. */
  function encode(encoder, buffers, sizes) {
    const all = { ...buffers };
    for (const { name: one, role, bytes } of kernel.buffers) {
      if (!all[one] && role === 'in') throw new Error(`${name} reads ${one}, which was not given`);
      all[one] ??= buffer(device, bytes(sizes)); // WebGPU gives zeros
    }
    const uniform = filled(device, new Uint32Array(kernel.sizes.map((one) => sizes[one])),
      GPUBufferUsage.UNIFORM);
    const bound = [...kernel.buffers.map((one) => all[one.name]), uniform];
    const groups = kernel.groups(sizes);
    if (groups[0] && groups[1]) {
      const pass = encoder.beginComputePass();
      pass.setPipeline(pipeline);
      pass.setBindGroup(0, device.createBindGroup({
        layout, entries: bound.map((one, binding) => ({ binding, resource: { buffer: one } })),
      }));
      pass.dispatchWorkgroups(...groups);
      pass.end();
    }
    return all;
  }
  return { name, kernel, pipeline, layout, encode };
}

function buffer(device, bytes, usage = GPUBufferUsage.STORAGE) {
  const { COPY_SRC, COPY_DST, UNIFORM } = GPUBufferUsage;
  const copied = usage === UNIFORM ? COPY_DST : COPY_SRC | COPY_DST;
  return device.createBuffer({ size: Math.max(Math.ceil(bytes / 4) * 4, 4), usage: usage | copied });
}

function filled(device, array, usage) {
  const bytes = new Uint8Array(Math.ceil(array.byteLength / 4) * 4); // whole words
  bytes.set(new Uint8Array(array.buffer, array.byteOffset, array.byteLength));
  const made = buffer(device, bytes.length, usage);
  device.queue.writeBuffer(made, 0, bytes);
  return made;
}

/** Rows of blocks in the order in which a kernel reads them: each field of all blocks together. */
export function repack(kernel, bytes) {
  if (!kernel.planes) return bytes;
  const count = bytes.length / kernel.blockBytes;
  const packed = new Uint8Array(bytes.length);
  for (const { offset, bytes: size, start } of kernel.planes) {
    for (let i = 0; i < count; i++) {
      const from = i * kernel.blockBytes + offset;
      packed.set(bytes.subarray(from, from + size), start * count + i * size);
    }
  }
  return packed;
}

/** A quantized matrix (N, K): `bytes` are its rows of blocks, as a GGUF file has them. */
export class Weights {
  #uploaded = new Map();

  constructor(device, format, N, K, bytes) {
    if (!blocks[format]) throw new Error(`format ${format} is not in this package`);
    const [block, size] = blocks[format];
    const wanted = N * (K / block) * size;
    if (K % block || bytes.length !== wanted) {
      throw new Error(`weights ${N} x ${K} in ${format} have ${wanted} bytes, and K is a multiple`
        + ` of ${block}; ${bytes.length} bytes were given`);
    }
    Object.assign(this, { device, format, N, K, bytes });
  }

  /** Rows that a binding may hold, with their buffer; uploaded once for each layout. */
  pieces(kernel) {
    const { device, N, bytes } = this;
    if (!this.#uploaded.has(kernel.layout)) {
      const row = bytes.length / Math.max(N, 1);
      const { maxStorageBufferBindingSize: most, maxBufferSize } = device.limits;
      const step = Math.floor(Math.min(most, maxBufferSize) / Math.max(row, 1));
      if (!step) throw new Error(`a row of ${row} bytes is more than a binding of this device`);
      const made = [];
      for (let from = 0; from < N; from += step) {
        const to = Math.min(from + step, N);
        const part = repack(kernel, bytes.subarray(from * row, to * row));
        made.push({ from, to, buffer: filled(device, part, GPUBufferUsage.STORAGE) });
      }
      this.#uploaded.set(kernel.layout, made);
    }
    return this.#uploaded.get(kernel.layout);
  }
}

async function download(device, from, bytes) {
  const { MAP_READ, COPY_DST } = GPUBufferUsage;
  const copy = device.createBuffer({ size: Math.max(bytes, 4), usage: MAP_READ | COPY_DST });
  const encoder = device.createCommandEncoder();
  encoder.copyBufferToBuffer(from, 0, copy, 0, Math.max(bytes, 4));
  device.queue.submit([encoder.finish()]);
  await copy.mapAsync(GPUMapMode.READ);
  const found = new Float32Array(copy.getMappedRange().slice(0, bytes));
  copy.destroy();
  return found;
}

/** y (M, N) = x (M, K) times the transpose of the weights, both Float32Array in row-major order. */
export async function matmul(device, x, w, { precision = 'auto', features = featuresOf(device) } = {}) {
  const { N, K } = w;
  const M = x.length / K;
  if (!precisions.includes(precision)) throw new Error(`precision ${precision} is not known`);
  if (!Number.isInteger(M)) throw new Error(`${x.length} numbers are no rows of ${K}`);
  const y = new Float32Array(M * N);
  if (!y.length) return y;
  const name = choose(w.format, precision, M, N, K, features);
  if (!name) throw new Error(`no kernel here multiplies by ${w.format} in ${precision}`);
  const { kernel, encode } = await loadKernel(device, name);
  const first = await Promise.all(kernel.needs.map((one) => loadKernel(device, one)));
  const encoder = device.createCommandEncoder();
  let inputs = { x: filled(device, x, GPUBufferUsage.STORAGE) };
  for (const one of first) inputs = one.encode(encoder, inputs, { M, K });
  const parts = w.pieces(kernel).map(({ from, to, buffer: weights }) => {
    const made = encode(encoder, { ...inputs, w: weights }, { M, N: to - from, K });
    return { from, to, y: made.y };
  });
  device.queue.submit([encoder.finish()]);
  for (const part of parts) {
    const width = part.to - part.from;
    const found = await download(device, part.y, 4 * M * width);
    for (let m = 0; m < M; m++) {
      y.set(found.subarray(m * width, (m + 1) * width), m * N + part.from);
    }
  }
  return y;
}

/** Rows of the weights that `ids` names, decoded: Float32Array (ids.length, K). */
export async function getRows(device, w, ids) {
  const { N, K } = w;
  const name = Object.keys(kernels).find((one) => (
    kernels[one].op === 'get_rows' && kernels[one].format === w.format));
  if (!name) throw new Error(`this package was built without get_rows for ${w.format}`);
  if (ids.some((id) => !(id >= 0 && id < N))) throw new Error(`rows are 0 to ${N - 1}`);
  const y = new Float32Array(ids.length * K);
  const { kernel, encode } = await loadKernel(device, name);
  for (const { from, to, buffer: weights } of w.pieces(kernel)) {
    const here = [...ids.keys()].filter((at) => from <= ids[at] && ids[at] < to);
    if (!here.length) continue;
    const named = filled(device, Uint32Array.from(here, (at) => ids[at] - from), GPUBufferUsage.STORAGE);
    const encoder = device.createCommandEncoder();
    const made = encode(encoder, { w: weights, ids: named }, { ROWS: here.length, N: to - from, K });
    device.queue.submit([encoder.finish()]);
    const found = await download(device, made.y, 4 * here.length * K);
    here.forEach((at, n) => y.set(found.subarray(n * K, (n + 1) * K), at * K));
  }
  return y;
}
