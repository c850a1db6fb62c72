//! The texts that changes become, made from the catalog: no connection below here but for reading the catalog.

pub(crate) mod combined;
pub(crate) mod fenced;
pub(crate) mod group;
pub(crate) mod model;
pub(crate) mod predicate;
pub(crate) mod shape;
pub(crate) mod statement;
pub(crate) mod traits;
pub(crate) mod writer;
