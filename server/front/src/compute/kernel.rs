//! The inner loop of a product in AVX-512: up to 12 rows by 32 columns, or 6 by 64, in registers.
//!
//! It is in assembler because Rust has had the intrinsics only since 1.89. Each value is the bias plus the products in
//! the order of the inputs, one fused operation each. So a row's bits depend neither on its neighbours nor on their
//! number.
//!
//! The lines of results are fetched for writing at the beginning: rows of results lie far apart, so the processor does not
//! foresee them, and waiting for them took 5 % of a large batch.

#![allow(unsafe_code)]

use std::arch::asm;

/// Rows that one call can compute.
pub const ROWS: usize = 12;
/// Up to this many rows a call can compute two panels. It is faster then: one has too few sums to wait for memory.
pub const ROWS_OF_TWO: usize = 6;
/// Columns of a panel.
pub const COLUMNS: usize = 32;

/// Whether this processor has the instructions.
pub fn is_available() -> bool {
    is_x86_feature_detected!("avx512f")
}

/// The processor's mode in which denormal numbers are zero, as in LiteRT's own kernels, until it is dropped.
///
/// They would also be slow: states that decay become denormal, and remain so.
pub struct DenormalsAreZero {
    before: u32,
}

impl DenormalsAreZero {
    /// "Flush to zero" and "denormals are zero" of the register MXCSR.
    const BITS: u32 = 0x8040;

    pub fn new() -> Self {
        let mut before = 0_u32;
        // SAFETY: every processor of this architecture has the register, and the address is that of a number.
        unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut before, options(nostack)) };
        Self::set(before | Self::BITS);
        DenormalsAreZero { before }
    }

    fn set(value: u32) {
        // SAFETY: the value is one that the register had, with bits that any processor with AVX-512 has.
        unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack)) };
    }
}

impl Drop for DenormalsAreZero {
    fn drop(&mut self) {
        Self::set(self.before);
    }
}

/// The operands of a call. Strides are in bytes.
#[derive(Clone, Copy)]
pub struct Operands {
    /// The rows: each `inputs` numbers.
    pub x: *const f32,
    pub x_stride: usize,
    /// A panel of weights: the bias of its columns, then for each input one number by column; 64-byte aligned.
    pub panel: *const f32,
    /// 2: the next panel follows this one, and its results follow in each row.
    pub panels: usize,
    /// At least 1.
    pub inputs: usize,
    /// The results: `COLUMNS` numbers a row, of each panel.
    pub out: *mut f32,
    pub out_stride: usize,
}

/// Compute some rows.
///
/// # Safety
///
/// `is_available` must hold, the operands must point to that many rows and numbers, and `rows` must be 1 to `ROWS`, or to
/// `ROWS_OF_TWO` of two panels.
pub unsafe fn run(rows: usize, operands: Operands) {
    match (rows, operands.panels) {
        (1, 2) => two_panels_1(operands),
        (2, 2) => two_panels_2(operands),
        (3, 2) => two_panels_3(operands),
        (4, 2) => two_panels_4(operands),
        (5, 2) => two_panels_5(operands),
        (_, 2) => two_panels_6(operands),
        (1, _) => rows_1(operands),
        (2, _) => rows_2(operands),
        (3, _) => rows_3(operands),
        (4, _) => rows_4(operands),
        (5, _) => rows_5(operands),
        (6, _) => rows_6(operands),
        (7, _) => rows_7(operands),
        (8, _) => rows_8(operands),
        (9, _) => rows_9(operands),
        (10, _) => rows_10(operands),
        (11, _) => rows_11(operands),
        (_, _) => rows_12(operands),
    }
}

/// A function for a number of rows. A row is its address and its two registers of sums.
macro_rules! kernel {
    ($name:ident: $([$row:literal $low:literal $high:literal])+) => {
        unsafe fn $name(operands: Operands) {
            let stride = operands.x_stride;
            asm!(
                "vmovaps zmm28, [rdi]",
                "vmovaps zmm29, [rdi + 64]",
                $(
                    concat!("vmovaps ", $low, ", zmm28"),
                    concat!("vmovaps ", $high, ", zmm29"),
                    "prefetchw [r10]",
                    "prefetchw [r10 + 64]",
                    "add r10, r11",
                )+
                $(concat!("sub r10, r11 // ", $low),)+
                "2:",
                "add rdi, 128",
                "vmovaps zmm28, [rdi]",
                "vmovaps zmm29, [rdi + 64]",
                $(
                    concat!("vbroadcastss zmm30, dword ptr [", $row, "]"),
                    concat!("vfmadd231ps ", $low, ", zmm30, zmm28"),
                    concat!("vfmadd231ps ", $high, ", zmm30, zmm29"),
                )+
                "add rsi, 4",
                "add rdx, 4",
                "add rcx, 4",
                "add r8, 4",
                "dec r9",
                "jnz 2b",
                $(
                    concat!("vmovups [r10], ", $low),
                    concat!("vmovups [r10 + 64], ", $high),
                    "add r10, r11",
                )+
                "vzeroupper",
                inout("rdi") operands.panel => _,
                inout("rsi") operands.x => _,
                inout("rdx") operands.x.wrapping_byte_add(3 * stride) => _,
                inout("rcx") operands.x.wrapping_byte_add(6 * stride) => _,
                inout("r8") operands.x.wrapping_byte_add(9 * stride) => _,
                in("rax") stride,
                inout("r9") operands.inputs => _,
                inout("r10") operands.out => _,
                in("r11") operands.out_stride,
                clobber_abi("C"),
                options(nostack),
            );
        }
    };
}

/// The same for two panels: a row has four registers of sums.
macro_rules! kernel_of_two {
    ($name:ident: $([$row:literal $first:literal $second:literal $third:literal $fourth:literal])+) => {
        unsafe fn $name(operands: Operands) {
            let stride = operands.x_stride;
            asm!(
                "vmovaps zmm24, [rdi]",
                "vmovaps zmm25, [rdi + 64]",
                "vmovaps zmm26, [rcx]",
                "vmovaps zmm27, [rcx + 64]",
                $(
                    concat!("vmovaps ", $first, ", zmm24"),
                    concat!("vmovaps ", $second, ", zmm25"),
                    concat!("vmovaps ", $third, ", zmm26"),
                    concat!("vmovaps ", $fourth, ", zmm27"),
                    "prefetchw [r10]",
                    "prefetchw [r10 + 64]",
                    "prefetchw [r10 + 128]",
                    "prefetchw [r10 + 192]",
                    "add r10, r11",
                )+
                $(concat!("sub r10, r11 // ", $first),)+
                "2:",
                "add rdi, 128",
                "add rcx, 128",
                "vmovaps zmm24, [rdi]",
                "vmovaps zmm25, [rdi + 64]",
                "vmovaps zmm26, [rcx]",
                "vmovaps zmm27, [rcx + 64]",
                $(
                    concat!("vbroadcastss zmm30, dword ptr [", $row, "]"),
                    concat!("vfmadd231ps ", $first, ", zmm30, zmm24"),
                    concat!("vfmadd231ps ", $second, ", zmm30, zmm25"),
                    concat!("vfmadd231ps ", $third, ", zmm30, zmm26"),
                    concat!("vfmadd231ps ", $fourth, ", zmm30, zmm27"),
                )+
                "add rsi, 4",
                "add rdx, 4",
                "dec r9",
                "jnz 2b",
                $(
                    concat!("vmovups [r10], ", $first),
                    concat!("vmovups [r10 + 64], ", $second),
                    concat!("vmovups [r10 + 128], ", $third),
                    concat!("vmovups [r10 + 192], ", $fourth),
                    "add r10, r11",
                )+
                "vzeroupper",
                inout("rdi") operands.panel => _,
                inout("rsi") operands.x => _,
                inout("rdx") operands.x.wrapping_byte_add(3 * stride) => _,
                inout("rcx") operands.panel.wrapping_add((operands.inputs + 1) * COLUMNS) => _,
                in("rax") stride,
                inout("r9") operands.inputs => _,
                inout("r10") operands.out => _,
                in("r11") operands.out_stride,
                clobber_abi("C"),
                options(nostack),
            );
        }
    };
}

/// A kernel for each number of rows: each name with its last row.
macro_rules! kernels {
    ($kernel:ident [$($rows:tt)*]) => {};
    ($kernel:ident [$($rows:tt)*] $name:ident $row:tt $($rest:tt)*) => {
        $kernel!($name: $($rows)* $row);
        kernels!($kernel [$($rows)* $row] $($rest)*);
    };
}

kernels!(kernel []
    rows_1 ["rsi" "zmm0" "zmm1"]
    rows_2 ["rsi + rax" "zmm2" "zmm3"]
    rows_3 ["rsi + 2*rax" "zmm4" "zmm5"]
    rows_4 ["rdx" "zmm6" "zmm7"]
    rows_5 ["rdx + rax" "zmm8" "zmm9"]
    rows_6 ["rdx + 2*rax" "zmm10" "zmm11"]
    rows_7 ["rcx" "zmm12" "zmm13"]
    rows_8 ["rcx + rax" "zmm14" "zmm15"]
    rows_9 ["rcx + 2*rax" "zmm16" "zmm17"]
    rows_10 ["r8" "zmm18" "zmm19"]
    rows_11 ["r8 + rax" "zmm20" "zmm21"]
    rows_12 ["r8 + 2*rax" "zmm22" "zmm23"]
);

kernels!(kernel_of_two []
    two_panels_1 ["rsi" "zmm0" "zmm1" "zmm2" "zmm3"]
    two_panels_2 ["rsi + rax" "zmm4" "zmm5" "zmm6" "zmm7"]
    two_panels_3 ["rsi + 2*rax" "zmm8" "zmm9" "zmm10" "zmm11"]
    two_panels_4 ["rdx" "zmm12" "zmm13" "zmm14" "zmm15"]
    two_panels_5 ["rdx + rax" "zmm16" "zmm17" "zmm18" "zmm19"]
    two_panels_6 ["rdx + 2*rax" "zmm20" "zmm21" "zmm22" "zmm23"]
);
