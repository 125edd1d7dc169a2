"""The artefact: conversion to LiteRT or a SavedModel, and its checks."""
