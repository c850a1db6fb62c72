//! Lines on stderr.

use std::io::Write;

/// On stderr whatever the test harness captures.
pub fn say(text: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// A line on stderr, past the test harness, when one seed is replayed.
#[macro_export]
macro_rules! trace {
    ($world:expr, $($text:tt)*) => {
        if $world.tracing {
            $crate::simulation::trace::say(format_args!("{:>10.3}  {}", $world.elapsed() as f64 / 1e6, format_args!($($text)*)));
        }
    };
}
