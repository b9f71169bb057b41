/// <reference types="@webgpu/types" />

export type Precision = 'auto' | 'fp32' | 'fp16' | 'bf16' | 'int8';

/** Sizes of a problem, by the names that kernels give them. */
export type Sizes = Record<string, number>;

export interface Kernel {
  op: string;
  /** Of the weights, where the op is about these. */
  format: string | null;
  precision: string;
  /** How weights lie: "native", as a file has them, or "planes": see `repack`. */
  layout: string;
  blockBytes: number;
  /** That a device must have. */
  features: string[];
  /** Kernels that make what it reads from activations. */
  needs: string[];
  /** In the order of the bindings; the sizes are a uniform behind them. */
  buffers: { name: string; role: string; bytes: (sizes: Sizes) => number }[];
  sizes: string[];
  groups: (sizes: Sizes) => [number, number];
  planes: { offset: number; bytes: number; start: number }[] | null;
  /** How far results may be off, relative to their RMS. */
  tolerance: number;
  source: string;
}

export interface Rule {
  format: string;
  precision: Precision;
  op: string;
  choices: { m: [number, number]; kernel: string }[];
  points: { m: number; n: number; k: number; kernel: string; device: string }[];
}

export interface LoadedKernel {
  name: string;
  kernel: Kernel;
  pipeline: GPUComputePipeline;
  layout: GPUBindGroupLayout;
  /** Records a launch; buffers by name, results and scratch memory made where they are missing. */
  encode(
    encoder: GPUCommandEncoder, buffers: Record<string, GPUBuffer | undefined>, sizes: Sizes,
  ): Record<string, GPUBuffer>;
}

/** All kernels by name; elements and bytes of a block by format; which kernel serves what. */
export const kernels: Record<string, Kernel>;
export const blocks: Record<string, [number, number]>;
export const rules: Rule[];
export const precisions: Precision[];

export function featuresOf(device: GPUDevice): Set<string>;
export function choose(
  format: string, precision: Precision, M: number, N: number, K: number, features?: Set<string>,
): string | null;
export function loadKernel(device: GPUDevice, name: string): Promise<LoadedKernel>;
export function repack(kernel: Kernel, bytes: Uint8Array): Uint8Array;

/** A quantized matrix (N, K): `bytes` are its rows of blocks, as a GGUF file has them. */
export class Weights {
  constructor(device: GPUDevice, format: string, N: number, K: number, bytes: Uint8Array);
  readonly device: GPUDevice;
  readonly format: string;
  readonly N: number;
  readonly K: number;
  readonly bytes: Uint8Array;
  pieces(kernel: Kernel): { from: number; to: number; buffer: GPUBuffer }[];
}

/** y (M, N) = x (M, K) times the transpose of the weights, in row-major order. */
export function matmul(
  device: GPUDevice, x: Float32Array, w: Weights,
  options?: { precision?: Precision; features?: Set<string> },
): Promise<Float32Array>;

/** Rows of the weights that `ids` names, decoded: (ids.length, K). */
export function getRows(
  device: GPUDevice, w: Weights, ids: ArrayLike<number> & Iterable<number> & number[],
): Promise<Float32Array>;
