// Words of kernelgen in WGSL.
%% if "subgroups" in features
enable subgroups;
%% endif
%% if "fp16" in features
enable f16;
fn to_half(x: f32) -> f16 { return f16(x); }
fn from_half(x: f16) -> f32 { return f32(x); }
%% endif
%% if "subgroups" in features
fn subgroup_sum(x: f32) -> f32 { return subgroupAdd(x); }
%% endif
fn f32_bits(x: f32) -> u32 { return bitcast<u32>(x); }
fn bits_f32(x: u32) -> f32 { return bitcast<f32>(x); }
fn nearest(x: f32) -> f32 { return round(x); }  // ties to even

// Four products of signed bytes, added to a sum.
fn dot4(a: u32, b: u32, sum: i32) -> i32 {
%% if "dot" in features
    return sum + dot4I8Packed(a, b);
%% else
    let x = vec4i(vec4u(a << 24u, a << 16u, a << 8u, a)) >> vec4u(24u);
    let y = vec4i(vec4u(b << 24u, b << 16u, b << 8u, b)) >> vec4u(24u);
    return sum + x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
%% endif
}

// Bit l of x to byte l, l = 0..3: the product puts copies of the four bits at distances of 7.
fn spread1(x: u32) -> u32 { return ((x & 15u) * 0x00204081u) & 0x01010101u; }

// The bytes of x, at most 127 and not 0, negated where those of `bits` are 1 and not 0: ~x + 1, which
// leaves no byte.
fn negate_bytes(x: u32, bits: u32) -> u32 { return (x ^ (bits * 255u)) + bits; }

fn pack_bytes(a: i32, b: i32, c: i32, d: i32) -> u32 {
    return (u32(a) & 255u) | ((u32(b) & 255u) << 8u) | ((u32(c) & 255u) << 16u) | (u32(d) << 24u);
}

%% for one in arguments if one.dtype == "u8"
%% set of = "" if one.name == "w" else "_" ~ one.name
// ${"The weights" if one.name == "w" else one.name} are bound as 32-bit words; addresses are in bytes.
fn load_u8${of}(address: u32) -> i32 { return i32((${one.name}[address / 4u] >> (address % 4u * 8u)) & 255u); }
fn load_i8${of}(address: u32) -> i32 { return (load_u8${of}(address) << 24u) >> 24u; }

// Two words hold an unaligned one. The second is not read where the first holds it all, as it may
// lie outside the buffer.
fn load_u32${of}(address: u32) -> u32 {
    let at = address / 4u;
    let shift = address % 4u * 8u;
    if (shift == 0u) { return ${one.name}[at]; }
    return (${one.name}[at] >> shift) | (${one.name}[at + 1u] << (32u - shift));
}
fn load_u16${of}(address: u32) -> u32 {
    if (address % 4u == 3u) { return load_u32${of}(address) & 0xFFFFu; }
    return (${one.name}[address / 4u] >> (address % 4u * 8u)) & 0xFFFFu;
}

// Half precision to single, subnormals, infinities and NaN included, whatever the device does with
// subnormals: the exponent is moved by a multiplication by 2^112.
fn load_f16${of}(address: u32) -> f32 {
    let h = load_u16${of}(address);
    let magnitude = (h & 0x7FFFu) << 13u;
    var bits = bitcast<u32>(bitcast<f32>(magnitude) * 0x1p112f);
    if ((h & 0x7C00u) == 0u) { bits = bitcast<u32>(f32(h & 0x3FFu) * 0x1p-24f); }
    if ((h & 0x7C00u) == 0x7C00u) { bits = magnitude | 0x7F800000u; }
    return bitcast<f32>(bits | ((h & 0x8000u) << 16u));
}

%% endfor
