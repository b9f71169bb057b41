//! Multiplies by a Q4_K matrix with the C library, and asks which WGSL kernel a GPU would run.
//! Standard library only.

use kernelgen_c::{choose, isa, Format, Precision, Weights};
use kernelgen_wgsl::Sizes;

const M: usize = 3;
const N: usize = 64;
const K: usize = 512;
const BLOCK: usize = 256;
const BLOCK_BYTES: usize = 144;

/// Numbers that look random, below 256.
struct Random(u32);

impl Random {
    fn next(&mut self) -> u8 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 24) as u8
    }
}

/// The values of a block of Q4_K whose scales d and dmin are 2^-10: see ggml's block_q4_K.
fn decode(block: &[u8]) -> Vec<f32> {
    let scales = &block[4..16];
    (0..BLOCK)
        .map(|i| {
            let g = i / 32;
            let (scale, min) = if g < 4 {
                (scales[g] & 63, scales[g + 4] & 63)
            } else {
                (
                    (scales[g + 4] & 15) | ((scales[g - 4] >> 6) << 4),
                    (scales[g + 4] >> 4) | ((scales[g] >> 6) << 4),
                )
            };
            let code = (block[16 + 32 * (i / 64) + i % 32] >> (4 * (i / 32 % 2))) & 15;
            (f32::from(scale) * f32::from(code) - f32::from(min)) / 1024.0
        })
        .collect()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut random = Random(1);
    let mut blocks: Vec<u8> = (0..N * K / BLOCK * BLOCK_BYTES).map(|_| random.next()).collect();
    for block in blocks.chunks_mut(BLOCK_BYTES) {
        block[..4].copy_from_slice(&[0x00, 0x14, 0x00, 0x14]); // 2^-10 as a half, twice
    }
    let x: Vec<f32> = (0..M * K).map(|_| f32::from(random.next()) / 128.0 - 1.0).collect();
    let values: Vec<f32> = blocks.chunks(BLOCK_BYTES).flat_map(decode).collect();

    let w = Weights::new(Format::Q4_K, N, K, &blocks)?;
    for (precision, allowed) in [(Precision::Fp32, 1e-6), (Precision::Auto, 2e-2)] {
        let y = w.matmul(&x, precision)?;
        let (mut difference, mut product) = (0f64, 0f64);
        for m in 0..M {
            for n in 0..N {
                let row = x[m * K..][..K].iter().zip(&values[n * K..][..K]);
                let exact: f64 = row.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                difference += (f64::from(y[m * N + n]) - exact).powi(2);
                product += exact.powi(2);
            }
        }
        let error = (difference / product).sqrt();
        let name = choose(Format::Q4_K, precision, M, N, K).unwrap_or_default();
        println!("{}, {name}: error {error:.1e} (allowed {allowed:.0e})", isa());
        assert!(error <= allowed);
    }

    let (m, n, k) = (M as u64, N as u64, K as u64);
    let kernel = kernelgen_wgsl::choose("q4_K", "auto", m, n, k, &[]).ok_or("no kernel serves")?;
    let (across, down) = (kernel.groups)(Sizes { M: m, N: n, K: k, ..Sizes::default() });
    println!("a GPU would run {} on {across} x {down} groups", kernel.entry);
    assert!(kernel.source.contains(kernel.entry));
    Ok(())
}
