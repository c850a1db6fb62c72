//! The rules: what of a batch is to be applied, what is refused without a look at its rows, and what is told of it. Pure.

pub(crate) mod ledger;
pub(crate) mod origin;
pub(crate) mod plan;
pub(crate) mod results;
pub(crate) mod validator;
