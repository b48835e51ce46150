//! Geometry of windowed layers, checked once when a network is built.
//!
//! All extents are per image. Every product that later sizes a buffer is
//! checked here, so kernels may multiply without looking back.

use crate::error::{Result, bail_shape};

/// Largest number of elements any value, weight or buffer may have: 2^31.
///
/// Far beyond real networks, and small enough that every offset fits `usize`
/// and every byte count fits `isize` on 64-bit hosts.
pub const MAX_ELEMENTS: usize = 1 << 31;

/// `a * b * …`, or a shape error that names `what`.
pub(crate) fn checked_product(what: &str, factors: &[usize]) -> Result<usize> {
    let mut product = 1usize;
    for &factor in factors {
        product = match product.checked_mul(factor) {
            Some(p) if p <= MAX_ELEMENTS => p,
            _ => bail_shape!("{what}: shape {factors:?} has more than {MAX_ELEMENTS} elements"),
        };
    }
    Ok(product)
}

/// Zero padding around an image, in pixels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Padding {
    /// Rows above.
    pub top: usize,
    /// Columns to the left.
    pub left: usize,
    /// Rows below.
    pub bottom: usize,
    /// Columns to the right.
    pub right: usize,
}

impl From<[usize; 4]> for Padding {
    /// From `[top, left, bottom, right]`.
    fn from([top, left, bottom, right]: [usize; 4]) -> Self {
        Self {
            top,
            left,
            bottom,
            right,
        }
    }
}

/// Geometry of a 2-D convolution. `[height, width]` throughout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConvGeometry {
    /// Channels of the input.
    pub in_channels: usize,
    /// Extent of the input.
    pub in_size: [usize; 2],
    /// Channels of the output.
    pub out_channels: usize,
    /// Extent of the output.
    pub out_size: [usize; 2],
    /// Extent of the kernel.
    pub kernel: [usize; 2],
    /// Step between neighbouring outputs.
    pub stride: [usize; 2],
    /// Step between neighbouring kernel taps.
    pub dilation: [usize; 2],
    /// Zero padding.
    pub padding: Padding,
    /// Groups; input and output channels are split evenly among them.
    pub groups: usize,
}

/// Limit of kernel, stride, dilation and padding values.
const MAX_WINDOW: usize = 1 << 16;

fn check_window(what: &str, field: &str, values: &[usize], minimum: usize) -> Result<()> {
    for &v in values {
        if v < minimum || v > MAX_WINDOW {
            bail_shape!(
                "{what}: {field} is {values:?}, expected values in {minimum}..={MAX_WINDOW}"
            );
        }
    }
    Ok(())
}

impl ConvGeometry {
    /// Check the attributes against an input of `[channels, height, width]` and
    /// compute the output's extent. `what` names the layer in errors.
    #[expect(
        clippy::too_many_arguments,
        reason = "they are a convolution's attributes"
    )]
    pub fn new(
        what: &str,
        input: [usize; 3],
        out_channels: usize,
        kernel: [usize; 2],
        stride: [usize; 2],
        dilation: [usize; 2],
        padding: [usize; 4],
        groups: usize,
    ) -> Result<Self> {
        let [in_channels, in_height, in_width] = input;
        check_window(what, "kernel", &kernel, 1)?;
        check_window(what, "stride", &stride, 1)?;
        check_window(what, "dilation", &dilation, 1)?;
        check_window(what, "padding", &padding, 0)?;
        if groups == 0 || out_channels == 0 {
            bail_shape!(
                "{what}: groups is {groups} and out_channels is {out_channels}, expected at least 1"
            );
        }
        if !in_channels.is_multiple_of(groups) || !out_channels.is_multiple_of(groups) {
            bail_shape!(
                "{what}: groups is {groups}, expected a divisor of the input channels ({in_channels}) \
                 and of out_channels ({out_channels})"
            );
        }
        let pad = Padding::from(padding);
        let mut out_size = [0; 2];
        for axis in 0..2 {
            let (extent, pads) = [
                (in_height, pad.top + pad.bottom),
                (in_width, pad.left + pad.right),
            ][axis];
            let span = dilation[axis] * (kernel[axis] - 1) + 1;
            let padded = extent + pads;
            if padded < span {
                bail_shape!(
                    "{what}: the kernel spans {span} pixels along axis {axis}, \
                     but the padded input has only {padded}"
                );
            }
            out_size[axis] = (padded - span) / stride[axis] + 1;
        }
        let geometry = Self {
            in_channels,
            in_size: [in_height, in_width],
            out_channels,
            out_size,
            kernel,
            stride,
            dilation,
            padding: pad,
            groups,
        };
        let [ph, pw] = geometry.padded_size();
        checked_product(what, &[in_channels, ph, pw])?;
        checked_product(what, &[out_channels, out_size[0], out_size[1]])?;
        checked_product(
            what,
            &[out_channels, in_channels / groups, kernel[0], kernel[1]],
        )?;
        // The im2col matrix of one group.
        checked_product(
            what,
            &[
                in_channels / groups,
                kernel[0],
                kernel[1],
                out_size[0],
                out_size[1],
            ],
        )?;
        Ok(geometry)
    }

    /// Input channels of one group.
    pub fn group_in_channels(&self) -> usize {
        self.in_channels / self.groups
    }

    /// Output channels of one group.
    pub fn group_out_channels(&self) -> usize {
        self.out_channels / self.groups
    }

    /// Kernel taps: height times width.
    pub fn taps(&self) -> usize {
        self.kernel[0] * self.kernel[1]
    }

    /// Pixels of one input channel.
    pub fn in_pixels(&self) -> usize {
        self.in_size[0] * self.in_size[1]
    }

    /// Pixels of one output channel.
    pub fn out_pixels(&self) -> usize {
        self.out_size[0] * self.out_size[1]
    }

    /// Extent of the input with its padding.
    pub fn padded_size(&self) -> [usize; 2] {
        [
            self.in_size[0] + self.padding.top + self.padding.bottom,
            self.in_size[1] + self.padding.left + self.padding.right,
        ]
    }
}

/// Geometry of a pooling window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolGeometry {
    /// Channels, the same in input and output.
    pub channels: usize,
    /// Extent of the input.
    pub in_size: [usize; 2],
    /// Extent of the output.
    pub out_size: [usize; 2],
    /// Extent of the window.
    pub kernel: [usize; 2],
    /// Step between neighbouring windows.
    pub stride: [usize; 2],
    /// Padding, never counted as a value by max-pooling.
    pub padding: Padding,
}

impl PoolGeometry {
    /// Check the attributes against an input of `[channels, height, width]` and
    /// compute the output's extent.
    ///
    /// With `ceil_mode` the extent is rounded up, but a last window that would
    /// start beyond the input and its leading padding is dropped (the rule of
    /// ONNX, PyTorch and Caffe).
    pub fn new(
        what: &str,
        input: [usize; 3],
        kernel: [usize; 2],
        stride: [usize; 2],
        padding: [usize; 4],
        ceil_mode: bool,
    ) -> Result<Self> {
        check_window(what, "kernel", &kernel, 1)?;
        check_window(what, "stride", &stride, 1)?;
        check_window(what, "padding", &padding, 0)?;
        let pad = Padding::from(padding);
        let [channels, in_height, in_width] = input;
        let mut out_size = [0; 2];
        for axis in 0..2 {
            let (extent, before, after) = [
                (in_height, pad.top, pad.bottom),
                (in_width, pad.left, pad.right),
            ][axis];
            // Otherwise a window could lie in the padding alone.
            if before >= kernel[axis] || after >= kernel[axis] {
                bail_shape!(
                    "{what}: padding is {padding:?}, expected less than the kernel {kernel:?}"
                );
            }
            let padded = extent + before + after;
            if padded < kernel[axis] {
                bail_shape!(
                    "{what}: the window spans {} pixels along axis {axis}, \
                     but the padded input has only {padded}",
                    kernel[axis]
                );
            }
            let travel = padded - kernel[axis];
            let mut out = travel / stride[axis] + 1;
            if ceil_mode
                && !travel.is_multiple_of(stride[axis])
                && out * stride[axis] < extent + before
            {
                out += 1;
            }
            out_size[axis] = out;
        }
        checked_product(what, &[channels, out_size[0], out_size[1]])?;
        Ok(Self {
            channels,
            in_size: [in_height, in_width],
            out_size,
            kernel,
            stride,
            padding: pad,
        })
    }
}
