//! Addition and concatenation.

use crate::isa::{Level, Simd, Task};

/// `sum += operand`
pub(crate) fn add_assign(level: Level, sum: &mut [f32], operand: &[f32]) {
    level.call(AddAssign { sum, operand });
}

struct AddAssign<'a> {
    sum: &'a mut [f32],
    operand: &'a [f32],
}

impl Task for AddAssign<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (sum, x) in self.sum.iter_mut().zip(self.operand) {
            *sum += x;
        }
    }
}

/// Copy `operand`, values of `operand_len` elements per image, to elements
/// `offset..` of each image of `output`, `output_len` elements each.
pub(crate) fn concat_one(
    operand: &[f32],
    operand_len: usize,
    output: &mut [f32],
    output_len: usize,
    offset: usize,
) {
    let images = operand
        .chunks_exact(operand_len)
        .zip(output.chunks_exact_mut(output_len));
    for (source, target) in images {
        target[offset..offset + operand_len].copy_from_slice(source);
    }
}
