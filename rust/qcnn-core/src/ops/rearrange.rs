//! Slices, padding and transpositions: values that only change their places.

use crate::isa::{Level, Simd, Task};
use crate::ops::strided::{Axis, Loops, strides};

/// Copies of elements from places of one image to places of another.
#[derive(Clone, Debug)]
pub struct Rearrange {
    loops: Loops,
    /// First element written, first element read.
    starts: [usize; 2],
    /// What elements hold that are not copied, if there are any.
    fill: Option<f32>,
}

impl Rearrange {
    /// Element `start + i * step` of every axis, for `i` below `shape`.
    pub fn slice(input: &[usize], start: &[usize], step: &[usize], shape: &[usize]) -> Self {
        let (from, to) = (strides(input), strides(shape));
        let axes: Vec<_> = (0..shape.len())
            .map(|i| Axis {
                len: shape[i],
                output: to[i],
                input: from[i] * step[i],
            })
            .collect();
        let first = from.iter().zip(start).map(|(a, b)| a * b).sum();
        Self {
            loops: Loops::new(&axes),
            starts: [0, first],
            fill: None,
        }
    }

    /// The input with `before` elements of `value` in front of every axis, in an
    /// output of `shape`.
    pub fn pad(input: &[usize], before: &[usize], shape: &[usize], value: f32) -> Self {
        let (from, to) = (strides(input), strides(shape));
        let axes: Vec<_> = (0..shape.len())
            .map(|i| Axis {
                len: input[i],
                output: to[i],
                input: from[i],
            })
            .collect();
        let first = to.iter().zip(before).map(|(a, b)| a * b).sum();
        Self {
            loops: Loops::new(&axes),
            starts: [first, 0],
            fill: (input != shape).then_some(value),
        }
    }

    /// The axes of `view` in the order `axes`.
    pub fn transpose(view: &[usize], axes: &[usize]) -> Self {
        let shape: Vec<_> = axes.iter().map(|&axis| view[axis]).collect();
        let (from, to) = (strides(view), strides(&shape));
        let loops: Vec<_> = axes
            .iter()
            .enumerate()
            .map(|(i, &axis)| Axis {
                len: view[axis],
                output: to[i],
                input: from[axis],
            })
            .collect();
        Self {
            loops: Loops::new(&loops),
            starts: [0, 0],
            fill: None,
        }
    }

    /// Rearrange images back to back: `lens` are the elements of one, input and
    /// output.
    pub(crate) fn run(&self, level: Level, lens: [usize; 2], input: &[f32], output: &mut [f32]) {
        level.call(Apply {
            plan: self,
            lens,
            input,
            output,
        });
    }
}

struct Apply<'a> {
    plan: &'a Rearrange,
    lens: [usize; 2],
    input: &'a [f32],
    output: &'a mut [f32],
}

impl Task for Apply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let plan = self.plan;
        let inner = plan.loops.inner();
        if let Some(value) = plan.fill {
            self.output.fill(value);
        }
        let [input_len, output_len] = self.lens;
        let images = self
            .input
            .chunks_exact(input_len)
            .zip(self.output.chunks_exact_mut(output_len));
        for (source, target) in images {
            let [to, from] = plan.starts;
            let (source, target) = (&source[from..], &mut target[to..]);
            plan.loops.for_each(|to, from| {
                let (source, target) = (&source[from..], &mut target[to..]);
                if (inner.output, inner.input) == (1, 1) {
                    target[..inner.len].copy_from_slice(&source[..inner.len]);
                } else {
                    let values = source.iter().step_by(inner.input);
                    let places = target.iter_mut().step_by(inner.output);
                    for (y, x) in places.zip(values).take(inner.len) {
                        *y = *x;
                    }
                }
            });
        }
    }
}
