//! Sums, products and concatenation.

use crate::isa::{Level, Simd, Task};
use crate::ops::strided::{Axis, Loops, strides};

/// How two values become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Combination {
    /// `a + b`
    Sum,
    /// `a * b`
    Product,
}

/// Combines an operand with a value in place. Along axes where the operand has
/// extent 1 it is repeated.
#[derive(Clone, Debug)]
pub struct Combine {
    combination: Combination,
    loops: Loops,
    lens: [usize; 2],
}

impl Combine {
    /// Plan for a value and an operand of these shapes.
    pub fn new(combination: Combination, value: &[usize], operand: &[usize]) -> Self {
        let (to, from) = (strides(value), strides(operand));
        let axes: Vec<_> = (0..value.len())
            .map(|i| Axis {
                len: value[i],
                output: to[i],
                input: if operand[i] == 1 { 0 } else { from[i] },
            })
            .collect();
        Self {
            combination,
            loops: Loops::new(&axes),
            lens: [value.iter().product(), operand.iter().product()],
        }
    }

    /// Combine images back to back.
    pub(crate) fn run(&self, level: Level, value: &mut [f32], operand: &[f32]) {
        level.call(Apply {
            plan: self,
            value,
            operand,
        });
    }
}

struct Apply<'a> {
    plan: &'a Combine,
    value: &'a mut [f32],
    operand: &'a [f32],
}

impl Task for Apply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self {
            plan,
            value,
            operand,
        } = self;
        match plan.combination {
            Combination::Sum => apply(plan, value, operand, |a, b| a + b),
            Combination::Product => apply(plan, value, operand, |a, b| a * b),
        }
    }
}

#[inline(always)]
fn apply(plan: &Combine, value: &mut [f32], operand: &[f32], f: impl Fn(f32, f32) -> f32) {
    let Combine { loops, lens, .. } = plan;
    let inner = loops.inner();
    let images = value
        .chunks_exact_mut(lens[0])
        .zip(operand.chunks_exact(lens[1]));
    for (value, operand) in images {
        loops.for_each(|to, from| {
            let value = &mut value[to..][..inner.len];
            if inner.input == 0 {
                let x = operand[from];
                for y in value {
                    *y = f(*y, x);
                }
            } else {
                for (y, x) in value.iter_mut().zip(&operand[from..]) {
                    *y = f(*y, *x);
                }
            }
        });
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
