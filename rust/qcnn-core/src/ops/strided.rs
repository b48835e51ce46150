//! Loops over two arrays with an axis in common that is not equally far apart.

/// Most axes a loop has.
pub const MAX_AXES: usize = 8;

/// One axis: its extent, and how many elements apart its neighbours are in the
/// output and in the input. 0 repeats the same element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Axis {
    /// Extent.
    pub len: usize,
    /// Distance in the output.
    pub output: usize,
    /// Distance in the input.
    pub input: usize,
}

/// A nest of loops, as few as the axes allow.
#[derive(Clone, Debug)]
pub struct Loops {
    outer: Vec<Axis>,
    inner: Axis,
}

impl Loops {
    /// Plan loops over `axes`, outermost first, at most [`MAX_AXES`]. Axes that
    /// follow each other in both arrays become one.
    pub fn new(axes: &[Axis]) -> Self {
        assert!(axes.len() <= MAX_AXES);
        let mut outer: Vec<Axis> = Vec::new();
        for &axis in axes.iter().filter(|axis| axis.len != 1) {
            match outer.last_mut() {
                Some(last)
                    if last.output == axis.len * axis.output
                        && last.input == axis.len * axis.input =>
                {
                    last.len *= axis.len;
                    last.output = axis.output;
                    last.input = axis.input;
                }
                _ => outer.push(axis),
            }
        }
        let inner = outer.pop().unwrap_or(Axis {
            len: 1,
            output: 1,
            input: 1,
        });
        Self { outer, inner }
    }

    /// The innermost loop.
    pub fn inner(&self) -> Axis {
        self.inner
    }

    /// Call `visit` with the element of the output and of the input where each
    /// run of the innermost loop starts.
    #[inline(always)]
    pub fn for_each(&self, mut visit: impl FnMut(usize, usize)) {
        let mut counters = [0; MAX_AXES];
        let [mut output, mut input] = [0; 2];
        'runs: loop {
            visit(output, input);
            for (counter, axis) in counters.iter_mut().zip(&self.outer).rev() {
                *counter += 1;
                output += axis.output;
                input += axis.input;
                if *counter < axis.len {
                    continue 'runs;
                }
                *counter = 0;
                output -= axis.len * axis.output;
                input -= axis.len * axis.input;
            }
            break;
        }
    }
}

/// Distances between neighbours of each axis of a contiguous array.
pub fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis];
    }
    strides
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axis(len: usize, output: usize, input: usize) -> Axis {
        Axis { len, output, input }
    }

    #[test]
    fn axes_in_a_row_are_merged() {
        let loops = Loops::new(&[axis(2, 30, 30), axis(5, 6, 6), axis(1, 6, 1), axis(6, 1, 1)]);
        assert!(loops.outer.is_empty());
        assert_eq!(loops.inner(), axis(60, 1, 1));
        // Repeated elements, too; a transposition not.
        assert_eq!(
            Loops::new(&[axis(5, 6, 0), axis(6, 1, 0)]).inner(),
            axis(30, 1, 0)
        );
        assert_eq!(
            Loops::new(&[axis(3, 4, 1), axis(4, 1, 3)]).outer,
            [axis(3, 4, 1)]
        );
        assert_eq!(Loops::new(&[]).inner().len, 1);
    }

    #[test]
    fn every_run_is_visited_in_order() {
        let loops = Loops::new(&[axis(2, 12, 1), axis(3, 4, 8), axis(4, 1, 3)]);
        let mut runs = Vec::new();
        loops.for_each(|output, input| runs.push((output, input)));
        assert_eq!(runs, [(0, 0), (4, 8), (8, 16), (12, 1), (16, 9), (20, 17)]);
    }
}
