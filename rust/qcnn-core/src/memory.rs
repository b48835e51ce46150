//! Memory for what kernels read and write most: zeros at first, aligned to cache lines.
//!
//! Large buffers are aligned to pages of 2 MiB, and the system is asked to use such pages.
//! Weights that are read once per image come from memory; with pages of 4 KiB the CPU
//! spends as much time on finding them as on fetching them, and its prefetching ends with
//! each page.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use bytemuck::Pod;

const LINE_BYTES: usize = 64;

const LARGE_PAGE_BYTES: usize = 2 << 20;

/// Least size of a buffer that gets large pages, the last of which may be used in part.
const LARGE_BYTES: usize = LARGE_PAGE_BYTES / 4;

/// A slice of its own, see the module's documentation.
pub(crate) struct Buffer<T: Pod> {
    start: NonNull<T>,
    len: usize,
}

impl<T: Pod> Buffer<T> {
    /// `len` zeros.
    ///
    /// # Panics
    ///
    /// If their size is not an `isize`. Without memory the process ends, as with `Vec`.
    pub(crate) fn zeroed(len: usize) -> Self {
        Self::try_zeroed(len).unwrap_or_else(|| match Self::layout(len) {
            Some(layout) => handle_alloc_error(layout),
            None => panic!("a buffer of {len} elements is too large"),
        })
    }

    /// `len` zeros, if there is memory for them.
    pub(crate) fn try_zeroed(len: usize) -> Option<Self> {
        let layout = Self::layout(len)?;
        if layout.size() == 0 {
            return Some(Self::default());
        }
        // SAFETY: the size is not zero.
        let start = NonNull::new(unsafe { alloc(layout) })?;
        advise(start, layout);
        // SAFETY: the memory has this size, and was just allocated for this buffer.
        unsafe { start.write_bytes(0, layout.size()) };
        Some(Self {
            start: start.cast(),
            len,
        })
    }

    /// A copy of `values`.
    pub(crate) fn copy_of(values: &[T]) -> Self {
        let mut buffer = Self::zeroed(values.len());
        buffer.copy_from_slice(values);
        buffer
    }

    /// Bytes that `len` elements take.
    pub(crate) fn bytes(len: usize) -> usize {
        Self::layout(len).map_or(usize::MAX, |layout| layout.size())
    }

    fn layout(len: usize) -> Option<Layout> {
        let bytes = len.checked_mul(size_of::<T>())?;
        let align = if bytes >= LARGE_BYTES {
            LARGE_PAGE_BYTES
        } else {
            LINE_BYTES
        };
        Some(Layout::from_size_align(bytes, align).ok()?.pad_to_align())
    }
}

/// Ask for large pages if the memory, not yet touched, is to have some.
fn advise(start: NonNull<u8>, layout: Layout) {
    #[cfg(target_os = "linux")]
    if layout.align() == LARGE_PAGE_BYTES {
        // That it fails is no error: it does so where the system has no such pages.
        // SAFETY: these pages belong to the buffer, and the advice changes no content.
        unsafe { libc::madvise(start.as_ptr().cast(), layout.size(), libc::MADV_HUGEPAGE) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (start, layout);
}

impl<T: Pod> Default for Buffer<T> {
    /// Without elements.
    fn default() -> Self {
        Self {
            start: NonNull::dangling(),
            len: 0,
        }
    }
}

impl<T: Pod> Drop for Buffer<T> {
    fn drop(&mut self) {
        let layout = Self::layout(self.len).expect("a buffer of this length exists");
        if layout.size() > 0 {
            // SAFETY: allocated with the layout of this length, which is not empty.
            unsafe { dealloc(self.start.cast().as_ptr(), layout) };
        }
    }
}

impl<T: Pod> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` elements, aligned and initialised, zeros being a value of every
        // `Pod`, or none at a dangling address.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: Pod> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T: Pod> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer of {} elements", self.len)
    }
}

// SAFETY: a buffer owns its elements, as a `Box` of a slice does.
unsafe impl<T: Pod + Send> Send for Buffer<T> {}
// SAFETY: as above; a shared buffer gives shared slices only.
unsafe impl<T: Pod + Sync> Sync for Buffer<T> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_that_are_aligned() {
        for bytes in [1, 63, 64, 65, LARGE_BYTES - 1, LARGE_BYTES, 5 << 20] {
            let mut buffer = Buffer::<u8>::zeroed(bytes);
            assert_eq!(buffer.len(), bytes);
            assert!(buffer.iter().all(|byte| *byte == 0), "{bytes}");
            let expected = if bytes >= LARGE_BYTES {
                LARGE_PAGE_BYTES
            } else {
                LINE_BYTES
            };
            assert_eq!(buffer.as_ptr().align_offset(expected), 0, "{bytes}");
            assert_eq!(Buffer::<u8>::bytes(bytes), bytes.next_multiple_of(expected));
            buffer.fill(7);
            assert!(buffer.iter().all(|byte| *byte == 7), "{bytes}");
        }
    }

    #[test]
    fn empty() {
        for buffer in [
            Buffer::<f32>::zeroed(0),
            Buffer::default(),
            Buffer::copy_of(&[]),
        ] {
            assert!(buffer.is_empty());
        }
        assert_eq!(Buffer::<f32>::bytes(0), 0);
    }

    #[test]
    fn more_than_there_is() {
        assert!(Buffer::<f32>::try_zeroed(usize::MAX).is_none());
        assert!(Buffer::<f32>::try_zeroed(isize::MAX as usize / 4 - 64).is_none());
    }
}
