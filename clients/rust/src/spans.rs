//! What ties local writes, and the applying of others' changes, to the app's traces.

use std::sync::Arc;

/// Gives the trace context of the current span.
pub(crate) type Traceparent = Arc<dyn Fn() -> Option<String> + Send + Sync>;
/// Makes the span of an apply, given the trace context of what is applied.
pub(crate) type ApplySpan = Arc<dyn Fn(Option<&str>) -> tracing::Span + Send + Sync>;
