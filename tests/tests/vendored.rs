//! What we added to the vendored glommio, whose own tests nobody runs (`vendor/README.md`): these files stand alone,
//! with their tests.

#[path = "../../vendor/glommio/src/sys/spare.rs"]
mod spare;
#[path = "../../vendor/glommio/src/executor/spin.rs"]
mod spin;
#[path = "../../vendor/glommio/src/sys/turns.rs"]
mod turns;
