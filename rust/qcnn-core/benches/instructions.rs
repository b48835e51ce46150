//! What the CPU's instructions allow: 16-bit integers beside 16-bit floats. Items are
//! instructions; divided by the clock rate, which `layers` prints, they are instructions per
//! cycle.

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::arch::{asm, is_x86_feature_detected};

    use divan::Bencher;
    use divan::counter::ItemsCount;

    /// Instructions of a call: 1,000 turns of 16 that do not wait for each other.
    const INSTRUCTIONS: usize = 16_000;

    /// Aligned, so that a load is one.
    #[repr(align(64))]
    struct Zeros([u64; 8]);

    /// A benchmark of `$instruction`, which writes a register, given its other operands.
    macro_rules! bench {
        ($name:ident, $feature:tt, $instruction:literal, $last:literal) => {
            #[divan::bench(ignore = !is_x86_feature_detected!($feature))]
            fn $name(bencher: Bencher<'_, '_>) {
                let zeros = Zeros([0; 8]);
                bencher
                    .counter(ItemsCount::new(INSTRUCTIONS))
                    .bench_local(|| {
                        // SAFETY: the CPU has the instruction; what is read is a vector, and
                        // all registers that are written are given up.
                        unsafe {
                            asm!(
                                "vpxord zmm16, zmm16, zmm16",
                                "2:",
                                ".irp i, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
                                concat!($instruction, " zmm\\i, ", $last),
                                ".endr",
                                "dec {turns}",
                                "jnz 2b",
                                "// {zeros}",
                                turns = inout(reg) INSTRUCTIONS / 16 => _,
                                zeros = in(reg) &raw const zeros.0,
                                out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _,
                                out("zmm4") _, out("zmm5") _, out("zmm6") _, out("zmm7") _,
                                out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
                                out("zmm12") _, out("zmm13") _, out("zmm14") _,
                                out("zmm15") _, out("zmm16") _,
                                options(nostack, readonly)
                            );
                        }
                    });
            }
        };
    }

    bench!(multiply_i16, "avx512vnni", "vpdpwssd", "zmm16, zmm16");
    bench!(multiply_f16, "avx512fp16", "vfmadd231ph", "zmm16, zmm16");
    bench!(look_up_i16, "avx512bw", "vpaddw", "zmm16, [{zeros}]");
    bench!(look_up_f16, "avx512fp16", "vaddph", "zmm16, [{zeros}]");
}

fn main() {
    divan::main();
}
