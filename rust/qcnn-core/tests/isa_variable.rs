//! The environment variable that forces an ISA. One test: the environment
//! belongs to the process.

use qcnn_core::isa::ISA_VARIABLE;
use qcnn_core::{Error, Isa};

fn detect(value: &str) -> Result<Isa, Error> {
    // SAFETY: this binary has one test, and no other thread that reads the
    // environment.
    unsafe { std::env::set_var(ISA_VARIABLE, value) };
    Isa::detect()
}

#[test]
fn forces_an_isa_or_fails() {
    let available = Isa::available();
    for isa in [Isa::Portable, Isa::Neon, Isa::Avx2, Isa::Avx512] {
        match detect(isa.name()) {
            Ok(detected) => assert!(detected == isa && available.contains(&isa)),
            Err(e) => {
                let message = e.to_string();
                assert!(!available.contains(&isa));
                assert!(
                    message.contains(isa.name()) && message.contains("\"portable\""),
                    "{message}"
                );
            }
        }
    }
    let message = detect("sse9").unwrap_err().to_string();
    assert!(
        message.contains(ISA_VARIABLE) && message.contains("sse9"),
        "{message}"
    );
    assert_eq!(detect("").unwrap(), *available.last().unwrap());
}
