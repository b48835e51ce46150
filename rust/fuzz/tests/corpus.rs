//! The inputs that fuzzing found worth keeping, cut short everywhere, and with each of
//! their bytes changed: on every toolchain, in every CI run.

use std::fs;
use std::path::Path;

fn replay(name: &str, target: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(name);
    let mut n_inputs = 0;
    for entry in fs::read_dir(&folder).expect("the corpus is there") {
        let path = entry.expect("the corpus can be listed").path();
        let mut input = fs::read(&path).expect("the corpus can be read");
        target(&input);
        for end in 0..input.len() {
            target(&input[..end]);
        }
        for i in 0..input.len() {
            let byte = input[i];
            // One bit, a digit or letter for another, the extremes.
            for other in [
                byte ^ 1,
                byte ^ 0x80,
                byte.wrapping_add(7),
                0,
                0xff,
                b'9',
                b'-',
            ] {
                input[i] = other;
                target(&input);
            }
            input[i] = byte;
        }
        n_inputs += 1;
    }
    assert!(n_inputs > 0, "{}: no inputs", folder.display());
}

#[test]
fn container() {
    replay("container", qcnn_fuzz::container);
}

#[test]
fn network() {
    replay("network", qcnn_fuzz::network);
}

#[test]
fn codes() {
    replay("codes", qcnn_fuzz::codes);
}
