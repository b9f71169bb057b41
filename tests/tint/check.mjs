// What Tint has to say about shaders: reads [{name, source, entry}] as JSON from standard input and
// writes {name: [message...]} for those that it rejects, by Dawn's null back end, which needs no GPU.
import { readFileSync } from 'node:fs';
import { create, globals } from 'webgpu';

Object.assign(globalThis, globals);
const gpu = create(['backend=null']);  // it must outlive what comes from it
const adapter = await gpu.requestAdapter();
const wanted = ['shader-f16', 'subgroups'].filter((name) => adapter.features.has(name));
const names = ['maxComputeWorkgroupStorageSize', 'maxComputeInvocationsPerWorkgroup',
               'maxComputeWorkgroupSizeX', 'maxStorageBuffersPerShaderStage'];
const requiredLimits = Object.fromEntries(names.map((name) => [name, adapter.limits[name]]));
const device = await adapter.requestDevice({ requiredFeatures: wanted, requiredLimits });

const rejected = {};
for (const { name, source, entry } of JSON.parse(readFileSync(0, 'utf8'))) {
  device.pushErrorScope('validation');
  const module = device.createShaderModule({ code: source });
  const { messages } = await module.getCompilationInfo();
  const wrong = messages.filter((m) => m.type === 'error')
    .map((m) => `line ${m.lineNum}: ${m.message} (${source.split('\n')[m.lineNum - 1]})`);
  if (wrong.length === 0) {
    device.createComputePipeline({ layout: 'auto', compute: { module, entryPoint: entry } });
  }
  const error = await device.popErrorScope();
  if (error && wrong.length === 0) wrong.push(error.message);
  if (wrong.length) rejected[name] = wrong;
}
console.log(JSON.stringify({ features: wanted, rejected }));
device.destroy();
